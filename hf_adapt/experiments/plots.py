"""A picture of an experiment: a point for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.summary import Results, Row, pair_name, runs_of

GREY, BLUE, ORANGE = "#9aa5b1", "#2a78c2", "#c25d2a"
PANELS_IN_A_ROW = 4


def plot(experiment: Experiment, rows: Sequence[Row], results: Results) -> Figure:
    """Accuracy on the target: a panel for each pair, a line for each method, a point a seed."""
    across = min(PANELS_IN_A_ROW, len(experiment.pairs))
    down = -(-len(experiment.pairs) // across)
    names = 0.09 * max(len(row.marked) for row in rows)
    width = 5.0 if across == 1 else 2.7
    height = 0.32 * len(rows) + 0.7
    figure = Figure(figsize=(names + width * across, height * down + 0.5), layout="constrained")
    label = "accuracy, %" if experiment.mixture is not None else "accuracy on the target, %"
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    for number, axes in enumerate(panels.flat):
        if number < len(experiment.pairs):
            _panel(axes, experiment, rows, results, experiment.pairs[number])
            if number + across >= len(experiment.pairs):
                axes.set_xlabel(label, fontsize=9)
        else:
            axes.axis("off")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _panel(
    axes: Any,
    experiment: Experiment,
    rows: Sequence[Row],
    results: Results,
    pair: tuple[str, str],
) -> None:
    for line, row in enumerate(rows):
        score, method = row.accuracy[pair], experiment.methods[row.method]
        if score is None or score["mean"] is None:
            continue
        is_baseline = method.is_baseline or row.method == experiment.baseline
        is_reference = is_baseline or method.is_bound
        level, colour = 100 * score["mean"], GREY if is_reference else BLUE
        axes.plot([level] * 2, [line - 0.34, line + 0.34], color=colour, lw=3, zorder=2)
        axes.annotate(
            f"{level:.1f}",
            (1.01, line),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color="#52606d" if is_reference else BLUE,
        )
        if is_reference:
            axes.axvline(level, ls="--", lw=1, color=GREY, zorder=0)
    points = [
        (100 * run["target_accuracy"], line)
        for line, row in enumerate(rows)
        for run in runs_of(results, row.method, pair)
        if run.get("target_accuracy") is not None
    ]
    axes.plot([], [], lw=3, color=BLUE, label="mean")
    axes.scatter(
        [level for level, _ in points],
        [line for _, line in points],
        s=22,
        color="white",
        edgecolor="black",
        zorder=3,
        label="a seed",
    )
    true = [
        run["target_true_shares"]
        for run in results
        if (run["source"], run["target"]) == pair and run.get("target_true_shares")
    ]
    if true:
        share = 100 * max(true[0].values())
        axes.axvline(share, ls=":", lw=1.5, color=ORANGE, label="most frequent class")
    axes.set_yticks(range(len(rows)), [row.marked for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(pair_name(pair), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
