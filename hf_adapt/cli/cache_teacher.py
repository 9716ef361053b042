"""`hf-adapt cache-teacher TEACHER DATA`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_adapt.cli.model_class import Task, model_class


def cache_teacher(
    teacher: Annotated[str, typer.Argument(help="The teacher's folder, or its id on the Hub.")],
    data: Annotated[
        str,
        typer.Argument(
            help="The training rows: a folder written by save_to_disk, a csv, json, jsonl or "
            "parquet file, or an id on the Hub. Rows that are tokenised already stay as they are."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the cache.")],
    task: Annotated[
        Task | None, typer.Option(help="The teacher's head; by default its own.")
    ] = None,
    text_column: Annotated[
        list[str] | None,
        typer.Option(help="Column with the texts; give it twice for pairs. By default 'text'."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split, if the data has several.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="The tokenizer; by default the teacher's own.", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Truncate each row to this many tokens, as in training.", min=1),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Store only this many of the most likely classes.", min=1)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the distillation; required with --top-k.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the stored logits: float32, float16 or bfloat16.")
    ] = "float32",
    batch_size: Annotated[int, typer.Option(help="Rows of a forward pass.", min=1)] = 32,
    device: Annotated[
        str | None, typer.Option(help="The device; by default a CUDA device if there is one.")
    ] = None,
) -> None:
    """Compute TEACHER's predictions for the rows in DATA once, for CachedTeacher(OUTPUT).

    If it is interrupted, run the same command again: it continues where it stopped.
    """
    from hf_adapt.distillation import cache_filling, row_files
    from hf_adapt.distillation.cache import CachedTeacher
    from hf_adapt.distillation.checks import num_positions
    from hf_adapt.distillation.tokenizers import token_limit
    from hf_adapt.engine.texts import column_names

    try:
        columns = column_names(text_column or "text")
        chosen = _device(device)
        head = model_class(teacher, task)
        rows, left_out = row_files.with_texts(row_files.read_rows(data, split, columns), columns)
        _say_left_out(left_out)
        words = _tokenizer(teacher, tokenizer)
        model = _teacher(teacher, head)
        cache = CachedTeacher(output, model, top_k, temperature, dtype)
        positions = num_positions(model)
        limit = max_length or token_limit(words, None)
        whole, rows = rows, row_files.tokenised(rows, words, columns, limit)
        if not row_files.is_tokenised(whole) and (longer := row_files.longer_rows(rows, positions)):
            assert positions is not None
            rows = row_files.tokenised(whole, words, columns, positions)
            _say_truncated(len(longer), positions)
        filled = cache_filling.fill_cache(cache, rows, words, batch_size=batch_size, device=chosen)
        with typer.progressbar(length=len(rows), label="Computing teacher predictions") as progress:
            done = 0
            for number in filled:
                progress.update(number - done)
                done = number
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    size = sum(file.stat().st_size for file in output.glob("*.bin"))
    typer.echo(
        f"{done} {'row' if done == 1 else 'rows'}, {cache.computed} of them computed now; "
        f"{size / 1e6:.1f} MB in {output}. "
        f'Train with: DistillationTrainer(teacher=CachedTeacher("{output}"), ...)'
    )


def _say_left_out(rows: Sequence[int]) -> None:
    if not rows:
        return
    first = ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")
    left_out = "rows without text were" if len(rows) > 1 else "row without text was"
    typer.echo(f"{len(rows)} {left_out} left out (row {first}, counted from 0).", err=True)


def _say_truncated(number: int, positions: int) -> None:
    typer.echo(
        f"{number} {'rows are' if number > 1 else 'row is'} truncated to the {positions} tokens "
        f"that the teacher takes. Use max_length={positions} in training too, or these rows will "
        "not be found in the cache.",
        err=True,
    )


def _device(named: str | None) -> str:
    """The named device, else a CUDA device if there is one.

    Raises:
        ValueError: If there is no such device.
    """
    import torch

    if named is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=named)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--device {named} cannot be used on this machine: {first.removesuffix('.')}. Name "
            "another, such as cpu or cuda:0."
        ) from error
    return named


def _tokenizer(teacher: str, named: str | None) -> Any:
    """The named tokenizer, else the teacher's; None for models that have none.

    Raises:
        ValueError: If the named tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    from hf_adapt.models.hub_names import check_hub_name

    if named is not None:
        check_hub_name(named)
    try:
        return AutoTokenizer.from_pretrained(named or teacher)
    except (ValueError, OSError, KeyError) as error:
        if named is None:
            return None
        raise ValueError(f"There is no tokenizer in {named}: {error}") from error


def _teacher(name: str, head: Any) -> Any:
    """The teacher, with a trained head.

    Raises:
        ValueError: If the teacher has no head, or its checkpoint lacks the head's weights.
    """
    from transformers import MODEL_MAPPING

    model, info = head.from_pretrained(name, output_loading_info=True)
    bodies: Any = MODEL_MAPPING.get(type(model.config), ())
    if type(model) in (bodies if isinstance(bodies, (list, tuple)) else (bodies,)):
        raise ValueError(
            f"{name} is a {type(model).__name__}, which has no head and so predicts nothing. Name "
            "a model that was trained for the task (its folder, or its id on the Hub)."
        )
    if missing := sorted(info["missing_keys"]):
        more = ", …" if len(missing) > 3 else ""
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}{more} of a "
            f"{type(model).__name__}, so its predictions would be random. Name a model that was "
            "trained for the task, or another --task."
        )
    return model
