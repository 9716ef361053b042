"""A picture of an experiment: a point for each seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.summary import Results, Row, runs_of

GREY, BLUE, ORANGE = "#9aa5b1", "#2a78c2", "#c25d2a"
PANELS_IN_A_ROW = 4


def plot(experiment: Experiment, rows: Sequence[Row], results: Results) -> Figure:
    """Accuracy on the target: a panel for each pair, a column for each method, a point a seed."""
    across = min(PANELS_IN_A_ROW, len(experiment.pairs))
    down = -(-len(experiment.pairs) // across)
    width = max(3.0, 0.75 * len(rows))
    figure = Figure(figsize=(width * across + 0.6, 2.9 * down + 0.9), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=False)
    for number, axes in enumerate(panels.flat):
        if number >= len(experiment.pairs):
            axes.axis("off")
            continue
        _panel(axes, experiment, rows, results, experiment.pairs[number])
        if number % across == 0:
            axes.set_ylabel("accuracy on the target, %")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _panel(
    axes: Any,
    experiment: Experiment,
    rows: Sequence[Row],
    results: Results,
    pair: tuple[str, str],
) -> None:
    points = [
        (place, 100 * run["target_accuracy"])
        for place, row in enumerate(rows)
        for run in runs_of(results, row.method, pair)
        if run.get("target_accuracy") is not None
    ]
    for place, row in enumerate(rows):
        score = row.accuracy[pair]
        if score is None or score["mean"] is None:
            continue
        level, method = 100 * score["mean"], experiment.methods[row.method]
        colour = GREY if method.is_baseline or method.is_bound else BLUE
        axes.hlines(level, place - 0.32, place + 0.32, color=colour, lw=3, zorder=2)
        axes.annotate(
            f"{level:.1f}",
            (place + 0.34, level),
            ha="right",
            va="bottom",
            fontsize=8,
            color=colour,
            xytext=(0, 2),
            textcoords="offset points",
        )
        if method.is_baseline or method.is_bound:
            axes.axhline(level, ls="--", lw=1, color=GREY, zorder=0)
    axes.plot([], [], lw=3, color=BLUE, label="mean")
    axes.scatter(
        [place for place, _ in points],
        [level for _, level in points],
        s=24,
        color="white",
        edgecolor="black",
        zorder=3,
        label="a seed",
    )
    shares = [
        run["target_true_shares"]
        for run in results
        if run.get("target_true_shares") and (run["source"], run["target"]) == pair
    ]
    if shares:
        axes.axhline(
            100 * max(shares[0].values()), ls=":", lw=1.5, color=ORANGE, label="most frequent class"
        )
    turned = max(len(row.method) for row in rows) * len(rows) > 45
    axes.set_xticks(
        range(len(rows)),
        [row.method for row in rows],
        rotation=30 if turned else 0,
        ha="right" if turned else "center",
        fontsize=8,
    )
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_title(" → ".join(pair), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, dpi=150, format="png")
    os.replace(part, path)
