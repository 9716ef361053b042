"""Features before and after adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_adapt.report.drawing import (
    MOST_CLASSES,
    WIDTH,
    Column,
    Plot,
    Table,
    class_colour,
    domain_colour,
    short,
)
from hf_adapt.report.methods import number
from hf_adapt.report.numbers import Numbers


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
