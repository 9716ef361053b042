"""The plots of a report, from its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_adapt.experiments.summary import percent, score, scores_of
from hf_adapt.report.drawing import (
    GREY,
    INK,
    Column,
    Plot,
    Table,
    class_colour,
    colour,
    domain_colour,
    short,
)
from hf_adapt.report.numbers import Numbers, curve_order

MOST_CLASSES = 12
"""Up to this number of classes a plot names them and colours each."""
WIDTH = 4.6

Runs = Sequence[Numbers]
"""The numbers of the runs of one pair that ended well, by method and seed."""


def methods_of(runs: Runs) -> dict[str, list[Numbers]]:
    """The runs of each method."""
    found: dict[str, list[Numbers]] = {}
    for run in runs:
        found.setdefault(run["method"], []).append(run)
    return found


def trained_on_target(runs: Runs) -> list[str]:
    """The methods that trained on target labels."""
    return [name for name, own in methods_of(runs).items() if own[0]["role"] == "bound"]


def number(value: float | None, digits: int = 3) -> str:
    """A value as the cell of a table."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}" if 0 < abs(value) < 0.01 else f"{value:.{digits}f}"


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
            if (interval := intervals[name]) is not None:
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


def mean_estimate(runs: Runs, method: str) -> Mapping[str, Any] | None:
    """An estimate and the ends of its interval, averaged over the seeds; None if one lacks it.

    It is `trusted` if it is for every seed.
    """
    found = [(run.get("estimates") or {}).get(method) for run in runs]
    if not found or None in found:
        return None
    means = {key: float(np.mean([e[key] for e in found])) for key in ("value", "low", "high")}
    return {**means, "trusted": not any(each["warnings"] for each in found)}


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


def curve_plots(key: str, runs: Runs) -> list[Plot]:
    """A plot for each term that was logged: a line for each run, a colour for each method.

    Runs that trained on target labels are left out, here and by layer.
    """
    runs = [run for run in runs if run["role"] != "bound"]
    names = sorted({name for run in runs for name in run["curves"]}, key=curve_order)
    places = {method: place for place, method in enumerate(methods_of(runs))}
    return [_curve_plot(f"{key}-curve{n}", name, runs, places) for n, name in enumerate(names)]


def _curve_plot(key: str, name: str, runs: Runs, places: Mapping[str, int]) -> Plot:
    own = [run for run in runs if name in run["curves"]]

    def draw(axes: Any) -> None:
        seen: set[str] = set()
        for run in own:
            steps, values = np.array(run["curves"][name], dtype=float).T
            tint, dashes = colour(places[run["method"]])
            label = None if run["method"] in seen else short(run["method"], 20)
            seen.add(run["method"])
            values = np.where(np.isfinite(values), values, np.nan)
            marker = "o" if len(values) < 12 else None
            axes.plot(steps, values, dashes, color=tint, lw=1.2, marker=marker, ms=2.5, label=label)
        axes.set_xlabel("step")
        axes.figure.legend(loc="outside lower center", ncols=2)

    rows = []
    for run in own:
        values = [value for _, value in run["curves"][name]]
        finite = [value for value in values if math.isfinite(value)]
        ends = [values[0], min(finite, default=None), max(finite, default=None), values[-1]]
        rows.append([run["method"], str(run["seed"]), str(len(values)), *map(number, ends)])
    heads = ("seed", "logged", "first", "lowest", "highest", "last")
    return Plot(
        key,
        name,
        f"{name} over the steps of training, a line for each run.",
        (3.2, 1.9 + 0.16 * math.ceil(len({run["method"] for run in own}) / 2)),
        draw,
        Table(name, [Column("method", numeric=False), *map(Column, heads)], rows),
    )


def confusion_plot(key: str, run: Numbers) -> Plot | None:
    """Which classes are taken for which, on labelled target rows."""
    counts = run["oracle"].get("confusion")
    if not counts:
        return None
    classes, matrix = run["classes"], np.array(counts)
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)

    def draw(axes: Any) -> None:
        span = range(len(classes))
        edges = np.arange(len(classes) + 1) - 0.5
        axes.pcolormesh(edges, edges, np.ones_like(shares), alpha=0.75 * shares, **_blue())
        named = len(classes) <= MOST_CLASSES
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
        Table(
            "Target rows by true class (rows) and predicted class (columns)",
            [Column("true", numeric=False), *map(Column, classes)],
            [[name, *map(str, row)] for name, row in zip(classes, counts, strict=True)],
        ),
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


def layers_plot(key: str, runs: Runs) -> Plot | None:
    """How well the domains can be told apart after each layer."""
    own = [run for run in runs if run["layers"] and run["role"] != "bound"]
    if not own:
        return None
    layers = list(dict.fromkeys(str(each["name"]) for run in own for each in run["layers"]))
    places = {method: place for place, method in enumerate(methods_of(runs))}

    def draw(axes: Any) -> None:
        seen: set[str] = set()
        for run in own:
            tint, dashes = colour(places[run["method"]])
            label = None if run["method"] in seen else short(run["method"], 20)
            seen.add(run["method"])
            xs = [layers.index(str(each["name"])) for each in run["layers"]]
            ys = [np.nan if (d := each.get("a_distance")) is None else d for each in run["layers"]]
            axes.plot(xs, ys, dashes, color=tint, marker="o", ms=3, lw=1.2, label=label)
        axes.set_xticks(
            range(len(layers)), [short(name, 18) for name in layers], rotation=45, ha="right"
        )
        axes.set_ylabel("proxy A-distance")
        axes.figure.legend(loc="outside lower center", ncols=2)

    rows = [
        [
            run["method"],
            str(run["seed"]),
            str(each["name"]),
            *(number(each.get(k)) for k in ("a_distance", "mmd")),
        ]
        for run in own
        for each in run["layers"]
    ]
    heads = [Column("method", numeric=False), Column("seed"), Column("layer", numeric=False)]
    return Plot(
        f"{key}-layers",
        "Distance of the domains by layer",
        "Proxy A-distance of source and target features after each layer: 0 is alike, 2 apart.",
        (WIDTH, 3.2),
        draw,
        Table("Distances by layer", [*heads, Column("A-distance"), Column("MMD")], rows),
    )


def embedding_plots(
    key: str, baseline: str, run: Numbers, before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[Plot]:
    """Features of source only and of an adapted run on the same two axes, in two colourings.

    Args:
        key: Prefix of the names.
        baseline: The name of source only.
        run: The numbers of the adapted run.
        before: Points, domains and predicted classes of source only, from [`projected`].
        after: Those of the adapted run.
    """
    names = {"domain": ["source", "target"], "predicted class": run["classes"]}
    sides = ((baseline, before), (run["method"], after))
    plots = []
    for coloured, labels in names.items():

        def draw(
            left: Any, right: Any, coloured: str = coloured, labels: Sequence[str] = labels
        ) -> None:
            tints = domain_colour if coloured == "domain" else class_colour
            for axes, (title, view) in zip((left, right), sides, strict=True):
                for place, label in enumerate(labels):
                    chosen = view["points"][view[coloured] == place]
                    axes.plot(
                        *chosen.T,
                        "o",
                        color=tints(place),
                        ms=2.6,
                        alpha=0.6,
                        mew=0,
                        label=short(label, 16) if axes is left else None,
                    )
                axes.set_title(short(title))
                axes.set_xticks([])
                axes.set_yticks([])
            right.sharex(left)
            right.sharey(left)
            left.autoscale()
            if len(labels) <= MOST_CLASSES:
                left.figure.legend(loc="outside lower center", ncols=4, markerscale=2)

        rows = [
            [
                when,
                label,
                str(int((view[coloured] == place).sum())),
                *_centre(view, coloured, place),
            ]
            for when, view in sides
            for place, label in enumerate(labels)
        ]
        heads = [Column("run", numeric=False), Column(coloured, numeric=False), Column("rows")]
        plots.append(
            Plot(
                f"{key}-embedding-{coloured.split()[-1]}",
                f"Features by {coloured}",
                f"Features of source and target rows, coloured by {coloured}: left {baseline}, "
                f"right {run['method']}, both on the same two principal components.",
                (WIDTH, 2.7),
                draw,
                Table(
                    "Mean position of the points",
                    [*heads, Column("first component"), Column("second component")],
                    rows,
                ),
                panels=2,
            )
        )
    return plots


def _centre(view: Mapping[str, Any], coloured: str, place: int) -> list[str]:
    chosen: NDArray[np.float64] = view["points"][view[coloured] == place]
    return [number(float(c), 2) for c in chosen.mean(0)] if len(chosen) else ["–", "–"]


def groups_plot(key: str, run: Numbers) -> Plot | None:
    """Accuracy on each group of target rows, with intervals."""
    groups = run["oracle"]["groups"]
    if not groups:
        return None
    worst = min(groups, key=lambda name: groups[name]["accuracy"])

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
    heads = ("accuracy, %", "low", "high", "rows")
    return Plot(
        f"{key}-groups",
        f"{run['method']}: accuracy by group",
        "Accuracy on each group of rows, with its interval.",
        (WIDTH, 0.28 * len(groups) + 0.8),
        draw,
        Table("Accuracy by group", [Column("group", numeric=False), *map(Column, heads)], rows),
        oracle=True,
    )
