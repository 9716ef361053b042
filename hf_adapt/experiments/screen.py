"""An experiment with a progress bar, and its tables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import datasets
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hf_adapt.alignment import recommended
from hf_adapt.experiments.cell import Cell
from hf_adapt.experiments.choice import choices, with_chosen, write_choices, write_to_label
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.label_file import LabelFile
from hf_adapt.experiments.methods import RECOMMENDED
from hf_adapt.experiments.report import describe_pairs, publish, tell_models
from hf_adapt.experiments.runner import cells_of, run_experiment
from hf_adapt.experiments.training import check_model, check_priors

FEW_RUNS = 6


def execute(
    experiment: Experiment,
    jobs: int | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> bool:
    """Run what is missing of an experiment, with a progress bar; print and write its tables.

    Args:
        experiment: What to run.
        jobs: Processes.
        overwrite: Run again what is finished.
        console: Where to print.

    Returns:
        Whether every run ended well.

    Raises:
        DataError: If rows cannot be read.
        ModelError: If the model cannot be loaded.
        RuntimeError: If a process was killed.
    """
    console = console or Console()
    datasets.disable_progress_bars()
    check_model(experiment)
    check_priors(experiment)
    describe_pairs(experiment, console)
    if any(method.adaptations == RECOMMENDED for method in experiment.methods.values()):
        names = ", ".join(type(each).__name__ for each in recommended())
        console.print(f"The recommended recipe is {names}.", highlight=False)
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    running: list[Cell] = []
    kept = 0
    # On a terminal the bar tells how far many runs are.
    is_short = len(cells_of(experiment)) <= FEW_RUNS
    tells_all = not console.is_terminal or is_short
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(cells_of(experiment)))

        def report(cell: Cell, result: dict[str, Any] | None, was_kept: bool) -> None:
            nonlocal kept
            if result is None:
                running.append(cell)
                if is_short and not console.is_terminal:
                    console.print(escape(f"{cell}: started"), soft_wrap=True, highlight=False)
            elif was_kept:
                kept += 1
                progress.advance(bar)
            else:
                running.remove(cell)
                progress.advance(bar)
                # One training fills the cells of all tasks of a mixture, and warns once.
                is_first = cell.source == experiment.pairs[0][0]
                tells = is_first or not experiment.methods[cell.method].mixes
                if tells_all or "error" in result or (tells and result["warnings"]):
                    console.print(_line(cell, result, tells), soft_wrap=True, highlight=False)
            more = f" and {len(running) - 1} more" if len(running) > 1 else ""
            now = f"{running[0]}{more}" if running else ""
            progress.update(bar, description=escape(now))

        results = run_experiment(experiment, jobs, overwrite, report)
    if kept:
        console.print(f"{kept} of {len(results)} runs are kept from earlier.", highlight=False)
    shown, rows = experiment, list[Mapping[str, Any]](results)
    if experiment.choose:

        def tell(text: str) -> None:
            console.print(escape(text), soft_wrap=True, highlight=False)

        files = {pair: LabelFile(experiment, *pair, tell) for pair in experiment.pairs}
        found = choices(experiment, results, files, tell)
        for (source, target, seed), choice in found.items():
            console.print(escape(f"\n{source} → {target}, seed {seed}"), highlight=False)
            tell(str(choice))
        written = write_choices(experiment, found)
        asked = write_to_label(experiment, found, files, tell)
        for file in (*written, *asked):
            tell(f"wrote {file}")
        if asked:
            tell(
                "The candidates disagree on these rows. Fill in their labels, from the top, and "
                "the same command chooses by them."
            )
        shown, rows = with_chosen(experiment, results, found)
    publish(shown, rows, console)
    tell_models(shown, rows, console)
    if experiment.prefix_folder is not None:
        console.print(
            escape(f"{experiment.prefix_folder} keeps the frozen layers' output for further runs."),
            soft_wrap=True,
            highlight=False,
        )
    command = shlex.join(["hf-adapt", "report", experiment.output_dir])
    console.print(escape(f"{command} makes a page of it"), soft_wrap=True, highlight=False)
    return not any("error" in result for result in results)


def _line(cell: Cell, result: dict[str, Any], tells_warnings: bool) -> str:
    if "error" in result:
        problem = escape(f"{cell}: {result['error']}")
        return f"[red]failed[/red] {problem}"
    accuracy = result.get("target_accuracy")
    score = "" if accuracy is None else f"{accuracy:.1%} on {cell.target}, "
    line = escape(f"{cell}: {score}{result['seconds']:.0f} s")
    if not (result["warnings"] and tells_warnings):
        return line
    return f"{line} [yellow]warned: {escape(result['first_warning'])}[/yellow]"
