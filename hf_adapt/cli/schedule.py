"""`hf-adapt schedule MODEL`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_adapt.cli.model_class import Task, model_class

if TYPE_CHECKING:
    from hf_adapt.unfreezing import UnfreezingSchedule


class Preset(enum.StrEnum):
    """Schedules by name."""

    gradual = "gradual"
    lp_ft = "lp-ft"


class Direction(enum.StrEnum):
    """Where unfreezing starts."""

    top_down = "top_down"
    bottom_up = "bottom_up"


def schedule(
    model: Annotated[str, typer.Argument(help="The model's folder, or its id on the Hub.")],
    task: Annotated[
        Task | None,
        typer.Option(help="The model's head; by default its own.", show_default=False),
    ] = None,
    preset: Annotated[Preset, typer.Option(help="The schedule.")] = Preset.gradual,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the run.", min=1)] = None,
    every_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of each phase.", min=1)
    ] = None,
    every_epochs: Annotated[float | None, typer.Option(help="Epochs of each phase.")] = None,
    direction: Annotated[
        Direction, typer.Option(help="Where unfreezing starts.")
    ] = Direction.top_down,
    until: Annotated[str | None, typer.Option(help="The last group to unfreeze.")] = None,
    switch: Annotated[
        str | None, typer.Option(help="For lp-ft: when all groups start to train; default 50%.")
    ] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(help="Learning rate of each level, relative to the level above it."),
    ] = None,
    rewarm_steps: Annotated[
        int, typer.Option(help="Warm-up steps of a newly unfrozen group.", min=0)
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this YAML file.")
    ] = None,
) -> None:
    """Print when each layer group of MODEL trains, and what a step costs then.

    Only the configuration is read, not the weights.
    """
    from hf_adapt.unfreezing import LPFT, Gradual, Moment, unfreezing_plan

    gradual_only = {
        "--every-steps": every_steps,
        "--every-epochs": every_epochs,
        "--until": until,
        "--direction": None if direction is Direction.top_down else direction,
    }
    others = gradual_only if preset is Preset.lp_ft else {"--switch": switch}
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
            f"\nWritten to {output}. Edit it, then use it with: "
            f'trainer.add_callback(GradualUnfreezingCallback("{output}"))'
        )


def _empty_model(name: str, task: Task | None) -> Any:
    """The model without weights, on the meta device."""
    import torch
    from transformers import AutoConfig

    found = model_class(name, task)
    config = AutoConfig.from_pretrained(name)
    is_auto = found.__name__.startswith("AutoModel")
    factory: Any = found.from_config if is_auto else found
    with torch.device("meta"):
        return factory(config)
