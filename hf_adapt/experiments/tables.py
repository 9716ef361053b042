"""Results as files: one csv in long form, and tables in Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.methods import CHOSEN, GIVEN, is_shifted
from hf_adapt.experiments.summary import (
    Results,
    Row,
    marked,
    pair_name,
    percent,
    runs_of,
    scores_of,
)

COLUMNS = (
    "source",
    "target",
    "method",
    "seed",
    "source_accuracy",
    "source_f1",
    "target_accuracy",
    "target_f1",
    "source_predicted_shares",
    "target_predicted_shares",
    "source_true_shares",
    "target_true_shares",
    "seconds",
    "peak_memory_mb",
    "warnings",
    "first_warning",
    "model",
    "error",
)
"""The columns of results.csv; shares of classes are JSON."""

WARNED = "warned: runs with a warning of an adaptation."

Cells = list[list[str]]


def to_csv(results: Results) -> str:
    """One line for each run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        writer.writerow([_plain(result.get(column)) for column in COLUMNS])
    return text.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return json.dumps({k: round(v, 4) for k, v in value.items()}, ensure_ascii=False)
    return round(value, 6) if isinstance(value, float) else value


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def pair_table(experiment: Experiment, rows: Sequence[Row], results: Results) -> Cells:
    """The table of an experiment with one pair: scores in both domains."""
    pair = experiment.pairs[0]
    keys = ("source_accuracy", "source_f1", "target_accuracy", "target_f1")
    head = ["method", "source acc.", "source F1", "target acc.", "target F1"]
    cells = [[*head, "gap closed", "seconds"]]
    for row in rows:
        runs = runs_of(results, row.method, pair)
        gap = row.gaps[pair]
        seconds = scores_of(runs, "seconds")
        cells.append(
            [
                row.marked,
                *(percent(scores_of(runs, key)) for key in keys),
                "–" if gap is None else f"{gap:.0%}",
                "–" if seconds is None else f"{seconds['mean']:.0f}",
            ]
        )
    return _without_empty_columns(cells)


def summary_table(rows: Sequence[Row], results: Results) -> Cells:
    """The table of an experiment with several pairs: means over them."""
    head = ["method", "target acc.", "gap closed", "below source only", "seconds", "memory MB"]
    cells = [head]
    for row in rows:
        runs = [run for run in results if run["method"] == row.method]
        seconds, memory = scores_of(runs, "seconds"), scores_of(runs, "peak_memory_mb")
        cells.append(
            [
                row.marked,
                "–" if row.average is None else f"{100 * row.average:.1f}",
                "–" if row.gap_closed is None else f"{row.gap_closed:.0%}",
                "–" if row.below is None else f"{row.below} of {row.compared}",
                "–" if seconds is None else f"{seconds['mean']:.0f}",
                "–" if memory is None else f"{memory['mean']:.0f}",
            ]
        )
    return _without_empty_columns(cells)


def task_table(experiment: Experiment, rows: Sequence[Row], results: Results) -> Cells:
    """The table of several tasks: a score for each, and what they gain on being trained alone."""
    cells = [["method", *experiment.data, "Δm", "seconds"]]
    for row in rows:
        own = [runs_of(results, row.method, pair) for pair in experiment.pairs]
        seconds = [found["mean"] for runs in own if (found := scores_of(runs, "seconds"))]
        cells.append(
            [
                row.marked,
                *(percent(row.accuracy[pair]) for pair in experiment.pairs),
                percent(row.gain, "+.1f"),
                f"{sum(filter(None, seconds)):.0f}" if seconds else "–",
            ]
        )
    return _without_empty_columns(cells)


def accuracy_table(experiment: Experiment, rows: Sequence[Row], results: Results) -> Cells:
    """Accuracy on the target by pair and method; a line for each of whichever are more."""
    cells = [["pair", *(row.method for row in rows)]]
    for pair in experiment.pairs:
        scores = [
            marked(percent(row.accuracy[pair]), runs_of(results, row.method, pair)) for row in rows
        ]
        cells.append([pair_name(pair), *scores])
    if len(rows) <= len(experiment.pairs):
        return cells
    cells[0][0] = "method"
    return [list(line) for line in zip(*cells, strict=True)]


def shares_table(experiment: Experiment, results: Results) -> Cells:
    """The shares of classes that are predicted on the targets, and the true ones if known."""
    labels = list(next((r["target_predicted_shares"] for r in results if "error" not in r), {}))
    cells = [["pair", "method", *labels]]
    for pair in experiment.pairs:
        for key, name in (("target_true_shares", "true"), ("target_predicted_shares", None)):
            for method in experiment.methods:
                own = runs_of(results, method, pair)
                runs = [run for run in own if key in run]
                shares = [scores_of([run[key] for run in runs], label) for label in labels]
                if runs:
                    cells.append(
                        [" → ".join(pair), name or marked(method, own), *map(percent, shares)]
                    )
                if name:
                    break
    return cells


def legend(experiment: Experiment, warned: bool = True) -> str:
    """What the columns mean, for the methods that there are.

    Args:
        experiment: Names them.
        warned: Whether there is a column of warned runs.
    """
    count = len(experiment.seeds)
    sentences = [
        f"In %, mean ± standard deviation over {count} seeds."
        if count > 1
        else "In %, of one run with one seed."
    ]
    methods = experiment.methods.items()
    if experiment.mixture is not None:
        sentences[0] = f"Accuracy i{sentences[0][1:]}"
        if experiment.baseline is not None:
            sentences.append(
                f"Δm: how much more accurate than {experiment.baseline} with the same seed, in "
                "% of its accuracy, as a mean over the tasks."
            )
        sentences.append("seconds: of training, all tasks together.")
        return " ".join([*sentences, *[WARNED] * warned])
    bounds = [name for name, method in methods if method.is_bound]
    if bounds:
        sentences.append(f"{bounds[0]}: trained on the target's labels.")
    if bounds and any(method.is_baseline for _, method in methods):
        over = ", averaged over the pairs where that is 10 points or more"
        sentences.append(
            "gap closed: share of the way, in target accuracy, from source only to "
            f"{bounds[0]}{over if len(experiment.pairs) > 1 else ''}."
        )
    if CHOSEN in experiment.methods:
        sentences.append(f"{CHOSEN}: the run that was chosen.")
    if len(experiment.pairs) > 1:
        sentences.append("below source only: pairs that are more than a point below it.")
    priors = {name: method.target_priors for name, method in methods}
    given = [name for name, prior in priors.items() if prior == GIVEN]
    wrong = {n: prior[GIVEN] for n, prior in priors.items() if is_shifted(prior)}
    if given or wrong:
        sentences.append(
            f"{'; '.join([*given, *wrong])}: with the target's class frequencies, counted on the "
            "labels of its training rows (an experimental setting; these labels have no other use)."
        )
    sentences += [
        f"{name}: with {100 * points:+.0f} points on the most frequent class."
        for name, points in wrong.items()
    ]
    return " ".join([*sentences, "seconds: of training.", *[WARNED] * warned])


def _without_empty_columns(cells: Cells) -> Cells:
    keep = [i for i, column in enumerate(zip(*cells, strict=True)) if set(column[1:]) != {"–"}]
    return [[row[i] for i in keep] for row in cells]
