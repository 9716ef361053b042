"""The command line: `hf-adapt schedule MODEL`, `hf-adapt cache-teacher TEACHER DATA`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoConfig, AutoTokenizer

from hf_adapt.distillation.cache import DTYPES, CachedTeacher
from hf_adapt.distillation.filling import fill_cache, read_rows, tokenised
from hf_adapt.unfreezing import LPFT, Gradual, UnfreezingSchedule, unfreezing_plan
from hf_adapt.unfreezing.phases import Moment

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


@app.callback()
def _main() -> None:
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
    dtype: Annotated[str, typer.Option(help=f"Of what is kept: {', '.join(DTYPES)}.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 32,
    device: Annotated[
        str | None, typer.Option(help="By default a CUDA device where there is one.")
    ] = None,
) -> None:
    """Compute TEACHER's predictions of the rows in DATA once, for CachedTeacher(OUTPUT).

    Stopped half-way, it goes on from there when it is called again.
    """
    try:
        words = _tokenizer(tokenizer or teacher)
        rows = tokenised(read_rows(data, split), words, text_column or ["text"], max_length)
        model = _head(teacher, task).from_pretrained(teacher)
        cache = CachedTeacher(output, model, top_k, temperature, dtype)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        filled = fill_cache(cache, rows, words, batch_size=batch_size, device=where)
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
        f"{done} rows, {cache.computed} of them asked now; {size / 1e6:.1f} MB in {output}. "
        f'Train with: DistillationTrainer(teacher=CachedTeacher("{output}"), ...)'
    )


def _tokenizer(name: str) -> Any:
    """The tokenizer of a folder or id; None for models that have none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError, KeyError):
        return None


def _head(name: str, task: Task | None) -> Any:
    """The class of a model's head.

    Raises:
        ValueError: If it cannot be told.
    """
    if task is not None:
        return getattr(transformers, HEADS[task])
    config = AutoConfig.from_pretrained(name)
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
    config = AutoConfig.from_pretrained(name)
    found = _head(name, task)
    is_auto = found.__name__.startswith("AutoModel")
    factory: Any = found.from_config if is_auto else found
    with torch.device("meta"):
        return factory(config)


if __name__ == "__main__":
    app()
