"""`hf-adapt report RUN…`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_adapt.cli.errors import check_installed, fail

NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2"}


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Output folders of hf-adapt run, or folders of pairs or single runs in them.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder to write to; by default report/ in the first RUN."
        ),
    ] = None,
) -> None:
    """Write a page about finished runs: what was compared, what came out, and what was chosen.

    The page is one HTML file that opens without a network. Its numbers (report.json) and its plots
    (*.png) are written beside it.
    """
    check_installed("report", NEEDED)

    from hf_adapt.report import ReportError, write_report

    try:
        page = write_report(runs, output)
    except (ReportError, OSError) as error:
        fail(str(error))
    typer.echo(f"wrote {page}")
