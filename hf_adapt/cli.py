"""The command line: `hf-adapt schedule MODEL`, `hf-adapt cache-teacher TEACHER DATA`.

torch and transformers take seconds to import, so that each command imports them for itself.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_adapt import __version__

if TYPE_CHECKING:
    from hf_adapt.unfreezing import UnfreezingSchedule

app = typer.Typer(
    help="Domain adaptation and knowledge transfer for the Hugging Face Trainer.",
    no_args_is_help=True,
    add_completion=False,
)


class Task(enum.StrEnum):
    """What a model's head is for."""

    sequence_classification = "sequence-classification"
    token_classification = "token-classification"
    question_answering = "question-answering"
    masked_lm = "masked-lm"
    causal_lm = "causal-lm"
    seq2seq_lm = "seq2seq-lm"
    image_classification = "image-classification"
    audio_classification = "audio-classification"
    none = "none"


HEADS = {
    Task.sequence_classification: "AutoModelForSequenceClassification",
    Task.token_classification: "AutoModelForTokenClassification",
    Task.question_answering: "AutoModelForQuestionAnswering",
    Task.masked_lm: "AutoModelForMaskedLM",
    Task.causal_lm: "AutoModelForCausalLM",
    Task.seq2seq_lm: "AutoModelForSeq2SeqLM",
    Task.image_classification: "AutoModelForImageClassification",
    Task.audio_classification: "AutoModelForAudioClassification",
    Task.none: "AutoModel",
}


class Preset(enum.StrEnum):
    """Schedules by name."""

    gradual = "gradual"
    lp_ft = "lp-ft"


class Direction(enum.StrEnum):
    """Where unfreezing starts."""

    top_down = "top_down"
    bottom_up = "bottom_up"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-adapt {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Domain adaptation and knowledge transfer for the Hugging Face Trainer."""


@app.command()
def schedule(
    model: Annotated[str, typer.Argument(help="A model's folder, or its id on the hub.")],
    task: Annotated[
        Task | None, typer.Option(help="The head; by default the model's own.", show_default=False)
    ] = None,
    preset: Annotated[Preset, typer.Option(help="Which schedule.")] = Preset.gradual,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the run.", min=1)] = None,
    every_steps: Annotated[int | None, typer.Option(help="Steps of a phase.", min=1)] = None,
    every_epochs: Annotated[float | None, typer.Option(help="Epochs of a phase.")] = None,
    direction: Annotated[Direction, typer.Option(help="Start here.")] = Direction.top_down,
    until: Annotated[str | None, typer.Option(help="The last group to be unfrozen.")] = None,
    switch: Annotated[
        str | None, typer.Option(help="lp-ft: when everything trains; 50% by default.")
    ] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Learning rate of a level relative to the one above.")
    ] = None,
    rewarm_steps: Annotated[
        int, typer.Option(help="Warm-up steps of a newly unfrozen group.", min=0)
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan here, as YAML.")
    ] = None,
) -> None:
    """Print when each layer group of MODEL trains, and what a step then costs.

    Only the configuration is read, not the weights.
    """
    from hf_adapt.unfreezing import LPFT, Gradual, unfreezing_plan
    from hf_adapt.unfreezing.phases import Moment

    given = {
        "--every-steps": every_steps,
        "--every-epochs": every_epochs,
        "--until": until,
        "--direction": None if direction is Direction.top_down else direction,
    }
    others = given if preset is Preset.lp_ft else {"--switch": switch}
    wrong = [name for name, value in others.items() if value is not None]
    if wrong:
        typer.echo(f"Error: --preset {preset} does not take {', '.join(wrong)}.", err=True)
        raise typer.Exit(1)
    try:
        chosen: UnfreezingSchedule = (
            LPFT(Moment.parse(switch or "50%"))
            if preset is Preset.lp_ft
            else Gradual(every_steps, every_epochs, direction.value, until)
        )
        plan = unfreezing_plan(
            _empty_model(model, task),
            schedule=chosen,
            max_steps=steps,
            layer_decay=layer_decay,
            rewarm_steps=rewarm_steps,
        )
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(str(plan))
    if output is not None:
        plan.save(output)
        typer.echo(
            f"\nWritten to {output}. Edit it, and: "
            f'trainer.add_callback(GradualUnfreezingCallback("{output}"))'
        )


@app.command()
def cache_teacher(
    teacher: Annotated[str, typer.Argument(help="The teacher's folder, or its id on the hub.")],
    data: Annotated[
        str,
        typer.Argument(
            help="The training rows: a folder made by save_to_disk, a csv, json, jsonl or parquet "
            "file, or an id on the hub. Tokenised rows are taken as they are."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to fill.")],
    task: Annotated[
        Task | None, typer.Option(help="The head; by default the teacher's own.")
    ] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(help="The text (twice for pairs); 'text' by default.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split, if there are several.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="By default the teacher's own.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Truncate the tokens here, as in training.", min=1)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep only the most likely classes.", min=1)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Needed with --top-k: that of the distillation.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of what is kept: float32, float16, bfloat16.")
    ] = "float32",
    batch_size: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 32,
    device: Annotated[
        str | None, typer.Option(help="By default a CUDA device where there is one.")
    ] = None,
) -> None:
    """Compute TEACHER's predictions of the rows in DATA once, for CachedTeacher(OUTPUT).

    Stopped half-way, it goes on from there when it is called again.
    """
    from hf_adapt.distillation import cache_filling, row_files
    from hf_adapt.distillation.cache import CachedTeacher
    from hf_adapt.distillation.checks import num_positions
    from hf_adapt.distillation.texts import column_names
    from hf_adapt.distillation.tokenizers import token_limit

    try:
        columns = column_names(text_column or "text")
        chosen = _device(device)
        head = _head(teacher, task)
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
        with typer.progressbar(length=len(rows), label="Asking the teacher") as progress:
            done = 0
            for number in filled:
                progress.update(number - done)
                done = number
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    size = sum(file.stat().st_size for file in output.glob("*.bin"))
    typer.echo(
        f"{done} {'row' if done == 1 else 'rows'}, {cache.computed} of them asked now; "
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
        f"that the teacher takes. Truncate there in training too (max_length={positions}), or "
        "these rows will not be found.",
        err=True,
    )


def _device(named: str | None) -> str:
    """The device that was named, else a CUDA device where there is one.

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
    """The tokenizer that was named, else the teacher's; None for models that have none.

    Raises:
        ValueError: If the one that was named cannot be loaded.
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
    """The teacher, with a head whose weights are there.

    Raises:
        ValueError: If it has none, or its weights are not there.
    """
    from transformers import MODEL_MAPPING

    model, info = head.from_pretrained(name, output_loading_info=True)
    bodies: Any = MODEL_MAPPING.get(type(model.config), ())
    if type(model) in (bodies if isinstance(bodies, (list, tuple)) else (bodies,)):
        raise ValueError(
            f"{name} is a {type(model).__name__}, which has no head and so predicts nothing. Name "
            "a model that was trained for the task (its folder, or its id on the hub)."
        )
    if missing := sorted(info["missing_keys"]):
        more = ", …" if len(missing) > 3 else ""
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}{more} of a "
            f"{type(model).__name__}, so its predictions would be random. Name a model that was "
            "trained for the task, or another --task."
        )
    return model


def _head(name: str, task: Task | None) -> Any:
    """The class of a model's head.

    Raises:
        ValueError: If it cannot be told, or there is no such model.
    """
    import transformers

    from hf_adapt.models.hub_names import check_hub_name

    check_hub_name(name)
    if task is not None:
        return getattr(transformers, HEADS[task])
    config = transformers.AutoConfig.from_pretrained(name)
    named = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    found = getattr(transformers, named, None)
    if found is None:
        raise ValueError(
            f"{name} names the class {named!r}, which transformers {transformers.__version__} "
            f"does not have. Pass --task: {', '.join(Task)}."
        )
    return found


def _empty_model(name: str, task: Task | None) -> Any:
    """The model without weights, on the meta device."""
    import torch
    from transformers import AutoConfig

    found = _head(name, task)
    config = AutoConfig.from_pretrained(name)
    is_auto = found.__name__.startswith("AutoModel")
    factory: Any = found.from_config if is_auto else found
    with torch.device("meta"):
        return factory(config)


if __name__ == "__main__":
    app()
