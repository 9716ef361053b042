"""What is printed and written about an experiment."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_adapt.experiments import plots, tables
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.data import cached_pair, label_columns
from hf_adapt.experiments.joint_training import mixtures_of
from hf_adapt.experiments.methods import CHOSEN
from hf_adapt.experiments.summary import Results, pair_name, summarize
from hf_adapt.experiments.tables import Cells
from hf_adapt.experiments.versions import installed
from hf_adapt.storage.text_file import write_figure, write_text

ONE_SIDED = 0.97
"""Above this share of a single class a model's predictions are pointed out."""
MOST_MODELS = 3
"""Above this number of saved models their folders are in results.csv alone."""
MOST_CLASSES = 12
"""Above this number of classes their shares are in results.csv alone."""


def describe_pairs(experiment: Experiment, console: Console) -> None:
    """Print how many rows each pair has."""
    for source, target in experiment.pairs:
        pair = cached_pair(experiment, source, target)
        task = experiment.task_of(source)
        name = escape(pair_name((source, target)))
        text = (
            f"[bold]{name}[/bold]: {len(pair.source['train'])} training rows with "
            f"labels (and {len(pair.source['dev'])} dev rows), "
            f"{len(pair.target_unlabelled)} of the target without; "
            f"{len(pair.source['test'])} and {len(pair.target['test'])} to test on."
        )
        if pair.is_one:
            text = (
                f"[bold]{name}[/bold]: {experiment.kind_of(source)}, {len(pair.labels)} classes; "
                f"{len(pair.source['train'])} training rows, "
                f"{len(pair.source['test'])} to test on."
            )
        if len(pair.target["test"]):
            truth = list(task.class_numbers(pair.target["test"][task.label_column]))
            share = max(map(truth.count, set(truth))) / len(truth)
            of = "" if pair.is_one else " of the target"
            text += f" Always answering the most frequent class{of} gives {share:.1%}."
        else:
            text += escape(_without_score(experiment, target))
        console.print(text, highlight=False)
    for mixture in dict.fromkeys(map(str, mixtures_of(experiment).values())):
        console.print(escape(mixture), highlight=False)


def _without_score(experiment: Experiment, target: str) -> str:
    """Why there is no score, in a sentence."""
    column, found = label_columns(experiment, target)
    if column in found:
        return f" {target} has too few labels in {column!r} to test on, so there is no score."
    near = difflib.get_close_matches(column, found, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f" {target} has no labels in a column {column!r} (it has {', '.join(found)}{hint}), "
        "so there is no score."
    )


def publish(experiment: Experiment, results: Results, console: Console) -> None:
    """Print the tables; write results.csv, table.md and accuracy.png to the output folder."""
    rows = summarize(experiment, results)
    folder = Path(experiment.output_dir)
    several = len(experiment.pairs) > 1
    scored = any(run.get("target_accuracy") is not None for run in results)
    shown: list[tuple[str, Cells]] = []
    if experiment.mixture is not None:
        shown.append(("Tasks", tables.task_table(experiment, rows, results)))
    elif several:
        shown.append(("Average over the pairs", tables.summary_table(rows, results)))
        shown.append(("Accuracy on the target", tables.accuracy_table(experiment, rows, results)))
    else:
        title = " → ".join(experiment.pairs[0])
        shown.append((title, tables.pair_table(experiment, rows, results)))
    shares = [[]] if experiment.mixture else tables.shares_table(experiment, results)
    if 2 < len(shares[0]) <= MOST_CLASSES + 2 and len(shares) > 1:
        shown.append(("Predicted shares of the classes", shares))
    legend = tables.legend(experiment, warned=any(run.get("warnings") for run in results))
    files = {
        "table.md": _document(shown, legend),
        "results.csv": tables.to_csv(results),
    }
    for name, text in files.items():
        write_text(folder / name, text)
    if scored:
        write_figure(folder / "accuracy.png", plots.plot(experiment, rows, results))
    for number, (title, cells) in enumerate(shown):
        is_shares = cells is shares
        if not is_shares or not scored:
            _print_table(console, title, cells, legend if number == 0 else None)
    for line in one_sided(experiment, results):
        console.print(f"[yellow]{escape(line)}[/yellow]", highlight=False)
    written = ", ".join([*files, *(["accuracy.png"] if scored else [])])
    console.print(escape(f"wrote {written} to {folder}"), soft_wrap=True, highlight=False)


def one_sided(experiment: Experiment, results: Results) -> list[str]:
    """Which runs give nearly all rows of the target one class, in sentences."""
    found = []
    for run in results if experiment.mixture is None else ():
        shares = run.get("target_predicted_shares") or {}
        name, share = max(shares.items(), key=lambda each: each[1], default=("", 0.0))
        if share > ONE_SIDED:
            found.append(
                f"{pair_name((run['source'], run['target']))}, {_described(run)}: {share:.1%} of "
                f"the rows are given the class {name!r}."
            )
    if found:
        more = [f"and {len(found) - 3} more runs (results.csv)."] if len(found) > 3 else []
        fix = "Unless that is right, these models are of no use. target_priors (--target-priors) "
        found = [*found[:3], *more, f"{fix}says how frequent the classes are."]
    return found


def _document(shown: Sequence[tuple[str, Cells]], legend: str) -> str:
    parts = [f"## {title}\n\n{tables.markdown(cells)}\n" for title, cells in shown]
    versions = ", ".join(f"{name} {version}" for name, version in installed().items())
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py" and script.name != "__main__.py"
    command = shlex.join([*(["python", str(script)] if is_script else ["hf-adapt"]), *sys.argv[1:]])
    return "\n".join(
        [*parts, legend, "", f"Command: `{command}`", "", f"Versions: {versions}.", ""]
    )


def _print_table(console: Console, title: str, cells: Cells, legend: str | None) -> None:
    widths = [max(map(len, column)) + 2 for column in zip(*cells[1:], strict=True)]
    if console.is_terminal and sum(widths) > console.width:
        console.print(escape(f"{title}: too wide for this terminal, see table.md"))
        return
    table = Table(
        title=escape(title),
        caption=None if legend is None else escape(legend),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, heading in enumerate(cells[0]):
        left = number == 0 or (cells[0][:2] == ["pair", "method"] and number == 1)
        table.add_column(
            escape(heading if left else heading.replace(" ", "\n")),
            justify="left" if left else "right",
            no_wrap=not left,
        )
    for row in cells[1:]:
        table.add_row(*map(escape, row))
    console.print(table)


def tell_models(experiment: Experiment, results: Results, console: Console) -> None:
    """Print where the models are, and how to try one."""
    saved: list[Any] = [run for run in results if run.get("model")]
    each = {run["model"]: run for run in saved}.values()  # what was chosen is there twice
    lines = [f"model of {_described(run)}: {run['model']}" for run in each]
    if len(lines) > MOST_MODELS:
        folder = Path(experiment.output_dir, "results.csv")
        lines = [f"{len(lines)} models are saved: see the column model of {folder}"]
    for line in lines:
        console.print(escape(line), soft_wrap=True, highlight=False)
    adapted = [run for run in saved if experiment.methods[run["method"]].adaptations]
    chosen = [run for run in saved if run["method"] == CHOSEN]
    if saved:
        last = (chosen or adapted or saved)[-1]
        task = experiment.task_of(last["source"])
        console.print("Try it:")
        console.print(
            escape(
                f'  python -c "from transformers import pipeline; '
                f"print(pipeline('{task.pipeline}', '{last['model']}')('{task.example}'))\""
            ),
            soft_wrap=True,
            highlight=False,
        )


def _described(run: Any) -> str:
    task = f"{run['source']}, " if run["source"] == run["target"] else ""
    return f"{task}{run['method']}, seed {run['seed']}"
