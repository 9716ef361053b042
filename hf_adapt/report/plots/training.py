"""What was logged in training, and the distance of the domains by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_adapt.report.drawing import (
    WIDTH,
    Column,
    Plot,
    Table,
    colour,
    short,
)
from hf_adapt.report.methods import Runs, methods_of, number
from hf_adapt.report.numbers import curve_order


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
