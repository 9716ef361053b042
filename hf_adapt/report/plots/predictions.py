"""Right and wrong answers of one model: confusion, calibration, groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_adapt.report.drawing import (
    GREY,
    MOST_CLASSES,
    MOST_CONFUSIONS,
    MOST_GROUPS,
    WIDTH,
    Column,
    Plot,
    Table,
    colour,
    short,
)
from hf_adapt.report.numbers import Numbers


def confusion_plot(key: str, run: Numbers) -> Plot | None:
    """Which classes are taken for which, on labelled target rows."""
    counts = run["oracle"].get("confusion")
    if not counts:
        return None
    classes, matrix = run["classes"], np.array(counts)
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    named = len(classes) <= MOST_CLASSES
    table = Table(
        "Target rows by true class (rows) and predicted class (columns)",
        [Column("true", numeric=False), *map(Column, classes)],
        [[name, *map(str, row)] for name, row in zip(classes, counts, strict=True)],
    )
    if not named:
        errors = matrix * (1 - np.eye(len(matrix), dtype=int))
        most = [divmod(int(cell), len(matrix)) for cell in np.argsort(-errors, axis=None)]
        table = Table(
            f"The {MOST_CONFUSIONS} most frequent confusions",
            [Column("true", numeric=False), Column("predicted", numeric=False), Column("rows")],
            [
                [classes[true], classes[guess], str(errors[true, guess])]
                for true, guess in most[:MOST_CONFUSIONS]
                if errors[true, guess]
            ],
        )

    def draw(axes: Any) -> None:
        span = range(len(classes))
        edges = np.arange(len(classes) + 1) - 0.5
        look = {**_blue(), "rasterized": not named}  # thousands of cells would make a huge drawing
        axes.pcolormesh(edges, edges, np.ones_like(shares), alpha=0.75 * shares, **look)
        for true in span if named else ():
            for guess in span:
                text = f"{100 * shares[true, guess]:.0f}"
                axes.text(guess, true, text, ha="center", va="center")
        names = [short(name, 14) for name in classes]
        axes.set_xticks(span if named else [], names if named else [], rotation=30, ha="right")
        axes.set_yticks(span if named else [], names if named else [])
        axes.set_ylim(len(classes) - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")

    side = 2.6 + 0.22 * max(0, min(len(classes), MOST_CLASSES) - 3)
    return Plot(
        f"{key}-confusion",
        f"{run['method']}: confusion of classes",
        "Share of the rows of each true class that is predicted as each class, in %.",
        (side, side * 0.9),
        draw,
        table,
        oracle=True,
    )


def _blue() -> dict[str, Any]:
    from matplotlib.colors import ListedColormap

    return {"cmap": ListedColormap([colour(0)[0]]), "edgecolors": "none"}


def calibration_plot(key: str, run: Numbers) -> Plot | None:
    """Whether confidence is right as often as it says, on source and target."""
    sides = {
        "source (held out)": run.get("source_calibration"),
        "target": run["oracle"].get("calibration"),
    }
    shown = {name: side for name, side in sides.items() if side}
    if not shown:
        return None
    oracle = bool(sides["target"])

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], ":", color=GREY, lw=1)
        for name, side in shown.items():
            tint, dashes = colour(list(sides).index(name))
            xs, ys = ([each[k] for each in side["bins"]] for k in ("confidence", "accuracy"))
            label = f"{name}{' (oracle)' * (name == 'target')}: ECE {100 * side['ece']:.1f} %"
            axes.plot(xs, ys, dashes, color=tint, marker="o", ms=3.5, lw=1.2, label=label)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.set_xlim(min(e["confidence"] for s in shown.values() for e in s["bins"]) - 0.03, 1.02)
        axes.set_ylim(-0.02, 1.04)
        axes.figure.legend(loc="outside lower center")

    rows = [
        [name, f"{each['confidence']:.3f}", f"{each['accuracy']:.3f}", str(each["count"])]
        for name, side in shown.items()
        for each in side["bins"]
    ]
    heads = ("confidence", "accuracy", "rows")
    return Plot(
        f"{key}-calibration",
        f"{run['method']}: calibration",
        "Accuracy over confidence in bins; on the dotted line 0.8 is right in 80 % of the cases.",
        (3.2, 2.9),
        draw,
        Table(
            "Bins of confidence",
            [Column("rows of", numeric=False), *map(Column, heads)],
            rows,
        ),
        oracle=oracle,
    )


def groups_plot(key: str, run: Numbers) -> Plot | None:
    """Accuracy on each group of target rows, with intervals."""
    given = run["oracle"]["groups"]
    if not given:
        return None
    largest = sorted(given, key=lambda name: -given[name]["count"])
    worst = min(largest, key=lambda name: given[name]["accuracy"])
    shown = largest[:MOST_GROUPS]
    groups = {name: given[name] for name in dict.fromkeys([*shown, worst])}
    which = "each group"
    if len(shown) < len(given):
        which = f"the {MOST_GROUPS} largest groups and the worst"

    def draw(axes: Any) -> None:
        for line, (name, group) in enumerate(groups.items()):
            tint = colour(1 if name == worst else 0)[0]
            axes.plot([100 * group["low"], 100 * group["high"]], [line] * 2, color=tint, lw=2)
            axes.plot([100 * group["accuracy"]], [line], "o", color=tint, ms=5)
        axes.set_yticks(range(len(groups)), [short(name) for name in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel("accuracy, %")

    rows = [
        [
            f"{name} (worst)" if name == worst else name,
            *(f"{100 * group[k]:.1f}" for k in ("accuracy", "low", "high")),
            str(group["count"]),
        ]
        for name, group in groups.items()
    ]
    heads = ("accuracy, %", "low", "high", "items")
    return Plot(
        f"{key}-groups",
        f"{run['method']}: accuracy by group",
        f"Accuracy on {which} of target rows, with its interval; {len(given)} in all.",
        (WIDTH, 0.28 * len(groups) + 0.8),
        draw,
        Table("Accuracy by group", [Column("group", numeric=False), *map(Column, heads)], rows),
        oracle=True,
    )
