"""`hf-adapt merge START TUNED`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_adapt.cli.errors import fail


def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="START TUNED",
            help="The model that training began from, and the one that it ended with: their "
            "folders, with safetensors files, or ids on the Hub. With --average, two or more.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the merged model.")],
    alpha: Annotated[
        float | None,
        typer.Option(help="The share of TUNED, from 0 to 1.", show_default=False),
    ] = None,
    average: Annotated[
        bool, typer.Option("--average", help="Take the mean of all models.")
    ] = False,
) -> None:
    """Blend a model with the one that it was tuned from, weight by weight.

    What was forgotten comes back, at some cost of what was learnt; try a few values of --alpha. A
    head that START lacks stays that of TUNED, and so do its configuration and tokenizer.
    """
    from hf_adapt.continual.merging import Merge

    if average == (alpha is not None):
        fail("Pass --alpha, the share of TUNED from 0 to 1, or --average, for the mean.")
    if not average and len(models) != 2:
        fail(f"--alpha blends two models, START and TUNED; got {len(models)}: {', '.join(models)}.")
    try:
        merged = Merge(models, alpha)
        blended = merged.write(output)
        with typer.progressbar(blended, length=len(merged.shared), label="Merging") as progress:
            for _ in progress:
                pass
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{len(merged.shared)} weights merged; written to {output}.")
    if merged.kept:
        first = ", ".join(merged.kept[:5]) + (", …" if merged.kept[5:] else "")
        typer.echo(f"Kept as they are in {models[-1]}: {first}.")
