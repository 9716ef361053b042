"""Accuracy and class shares of all methods on the target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_adapt.experiments.summary import percent, score, scores_of
from hf_adapt.report.drawing import (
    GREY,
    INK,
    MOST_CLASSES,
    WIDTH,
    Column,
    Plot,
    Table,
    class_colour,
    colour,
    short,
)
from hf_adapt.report.methods import Runs, mean_estimate, methods_of


def accuracy_plot(key: str, runs: Runs) -> Plot | None:
    """Estimated accuracy on the target with its interval, and the one from labels if there is."""
    methods = methods_of(runs)
    levels = {
        name: [run["oracle"]["accuracy"] for run in own if run["oracle"]["accuracy"] is not None]
        for name, own in methods.items()
    }
    intervals = {name: mean_estimate(own, "atc") for name, own in methods.items()}
    if not any(levels.values()) and not any(intervals.values()):
        return None
    oracle = any(levels.values())

    def draw(axes: Any) -> None:
        for line, name in enumerate(methods):
            interval = intervals[name]
            if interval is not None:
                value, low, high = (100 * interval[k] for k in ("value", "low", "high"))
                axes.plot([low, high], [line + 0.16] * 2, color=GREY, lw=4, solid_capstyle="butt")
                fill = INK if interval["trusted"] else "none"
                axes.plot([value], [line + 0.16], "D", mec=INK, mfc=fill, ms=4)
            if levels[name]:
                shown = [100 * level for level in levels[name]]
                axes.plot(
                    [np.mean(shown)] * 2, [line - 0.34, line + 0.02], color=colour(0)[0], lw=3
                )
                axes.plot(
                    shown, [line - 0.16] * len(shown), "o", mfc="none", mec=INK, ms=4, mew=0.9
                )
        axes.plot([], [], color=GREY, lw=4, marker="D", mfc=INK, mec=INK, ms=4, label="estimate")
        if oracle:
            axes.plot([], [], color=colour(0)[0], lw=3, label="mean (oracle)")
            axes.plot([], [], "o", mfc="none", mec=INK, ms=4, label="a seed (oracle)")
        axes.set_yticks(range(len(methods)), [short(name) for name in methods])
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_xlabel("accuracy on the target, %")
        axes.figure.legend(loc="outside lower center", ncols=3)

    columns = [Column("method", numeric=False), Column("estimate (ATC), %"), Column("interval, %")]
    rows = [[name, percent(_as_score(e)), _range(e)] for name, e in intervals.items()]
    if oracle:
        columns.append(Column("accuracy, %", oracle=True))
        for row, own in zip(rows, levels.values(), strict=True):
            row.append(percent(score(own) if own else None))
    return Plot(
        f"{key}-accuracy",
        "Accuracy on the target: estimated" + (", and from its labels" if oracle else ""),
        "For each method the accuracy that is estimated without target labels, with its interval"
        + (", and the accuracy of each seed on labelled target rows." if oracle else "."),
        (WIDTH, 0.34 * len(methods) + 1.0),
        draw,
        Table("Accuracy on the target", columns, rows),
        oracle=oracle,
    )


def _as_score(interval: Mapping[str, Any] | None) -> dict[str, float | None] | None:
    return None if interval is None else {"mean": interval["value"], "sd": None}


def _range(interval: Mapping[str, Any] | None) -> str:
    return (
        "–" if interval is None else f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f}"
    )


def shares_plot(key: str, runs: Runs) -> Plot | None:
    """The shares of the classes that each method predicts, and the true ones if there are."""
    methods = {n: [r for r in own if r["predicted_shares"]] for n, own in methods_of(runs).items()}
    methods = {name: own for name, own in methods.items() if own}
    if not methods:
        return None
    classes = list(next(iter(methods.values()))[0]["predicted_shares"])
    true = next((r["oracle"]["true_shares"] for r in runs if r["oracle"]["true_shares"]), None)
    scores = {
        name: {c: scores_of([run["predicted_shares"] for run in own], c) for c in classes}
        for name, own in methods.items()
    }
    bars = {n: [(s or {}).get("mean") or 0.0 for s in own.values()] for n, own in scores.items()}
    if true:
        bars["true (oracle)"] = [true.get(name, 0.0) for name in classes]

    def draw(axes: Any) -> None:
        left = np.zeros(len(bars))
        for place, name in enumerate(classes):
            widths = 100 * np.array([shares[place] for shares in bars.values()])
            label = short(name, 16) if len(classes) <= MOST_CLASSES else None
            axes.barh(
                range(len(bars)),
                widths,
                left=left,
                height=0.7,
                color=class_colour(place),
                label=label,
            )
            left = left + widths
        axes.set_yticks(range(len(bars)), [short(name) for name in bars])
        axes.invert_yaxis()
        axes.set_xlabel("share of the target rows, %")
        if len(classes) <= MOST_CLASSES:
            axes.figure.legend(loc="outside lower center", ncols=4, handlelength=1)

    rows = [[name, *map(percent, own.values())] for name, own in scores.items()]
    if true:
        rows.append(["true (oracle)", *(f"{100 * true.get(name, 0.0):.1f}" for name in classes)])
    return Plot(
        f"{key}-shares",
        "Predicted class shares on the target",
        "For each method the shares of the classes among its predictions for target rows.",
        (WIDTH, 0.28 * len(bars) + 1.0),
        draw,
        Table(
            "Class shares on the target, %",
            [Column("method", numeric=False), *map(Column, classes)],
            rows,
        ),
        oracle=bool(true),
    )
