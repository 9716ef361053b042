"""What the examples make of their numbers: means over seeds, tables, pictures and files."""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from hf_adapt.experiments.plots import BLUE, GREY
from hf_adapt.experiments.summary import Score, score
from hf_adapt.experiments.tables import markdown
from hf_adapt.experiments.versions import installed
from hf_adapt.storage.text_file import write_figure, write_text


# ---------------------------------------------------------------- numbers
def summarize(
    runs: Iterable[Mapping[str, Any]], methods: Iterable[str], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds of each named value, for the methods that were run."""
    summary = {}
    for method in methods:
        if own := [run for run in runs if run["method"] == method]:
            summary[method] = {name: score([run[name] for run in own]) for name in names}
    return summary


# ---------------------------------------------------------------- pictures
def grouped_bars(
    axes: Axes,
    ticks: Sequence[str],
    series: Mapping[str, Sequence[Score]],
    **style: Any,
) -> list[Any]:
    """Two bars in % side by side for each tick; return matplotlib's two containers of bars."""
    containers = []
    for offset, ((label, scores), colour) in enumerate(
        zip(series.items(), (GREY, BLUE), strict=False)
    ):
        repeated = any(score["sd"] is not None for score in scores)
        containers.append(
            axes.bar(
                [i + 0.4 * offset for i in range(len(scores))],
                [100 * score["mean"] for score in scores],
                yerr=[100 * (score["sd"] or 0) for score in scores] if repeated else None,
                width=0.38,
                capsize=3,
                color=colour,
                label=label,
            )
        )
    axes.set_xticks([i + 0.2 for i in range(len(ticks))], ticks, **style)
    return containers


# ---------------------------------------------------------------- files
def points(axes: Axes, scores: Mapping[str, Sequence[float]]) -> None:
    """A point in % for each run, and a line of them for each method."""
    for place, values in enumerate(scores.values()):
        percents = [100 * value for value in values]
        axes.scatter(percents, [place] * len(percents), s=22, alpha=0.7, color=f"C{place}")
    axes.set_yticks(range(len(scores)), list(scores))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def report(
    rows: Sequence[Sequence[str]],
    legend: str,
    document: Mapping[str, Any],
    figures: Mapping[str, Figure],
    output_dir: Path,
    console: Console,
    title: str | None = None,
) -> None:
    """Print a table; write it, the numbers and the pictures.

    Args:
        rows: The table's cells, head first.
        legend: What is printed below the table.
        document: What results.json holds beside the command and the versions.
        figures: Pictures by file name.
        output_dir: Folder for all of it.
        console: Where the table is printed.
        title: What is printed above the table.
    """
    table = Table(
        title=title,
        caption=legend,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,  # all columns fit in 80 characters
        collapse_padding=True,
    )
    for heading, first in zip(*rows[:2], strict=True):
        justify = "left" if first[0].isalpha() else "right"
        table.add_column(heading.replace(" ", "\n"), justify=justify, no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    about = {"command": shlex.join(["python", *sys.argv]), "versions": installed()}
    write_text(output_dir / "results.json", json.dumps({**about, **document}, indent=2))
    above = f"{title}\n\n" if title else ""
    write_text(output_dir / "table.md", f"{above}{markdown(rows)}\n\n{legend}\n")
    for name, figure in figures.items():
        write_figure(output_dir / name, figure)
    for name in ("results.json", "table.md", *figures):
        console.print(f"wrote {output_dir / name}", soft_wrap=True, highlight=False)
