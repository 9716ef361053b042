"""A section of the page: a pair of domains."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from hf_adapt.experiments.outputs import RunOutputs
from hf_adapt.report import drawing, outcome, plots, tables
from hf_adapt.report.drawing import Plot, Table
from hf_adapt.report.embedding import projected
from hf_adapt.report.numbers import Numbers, numbers_of
from hf_adapt.report.runs import Pair
from hf_adapt.report.words import Sentence

PER_PAIR = (plots.accuracy_plot, plots.shares_plot, plots.layers_plot)
PER_METHOD = (plots.confusion_plot, plots.calibration_plot, plots.groups_plot)


@dataclass(frozen=True)
class Shown:
    """A plot as the template takes it."""

    plot: Plot
    svg: Markup


@dataclass(frozen=True)
class Details:
    """What the page says of a method, by its first seed.

    Args:
        run: The numbers of that run.
        is_open: Whether it is unfolded.
        plots: Its plots.
    """

    run: Numbers
    is_open: bool
    plots: Sequence[Shown]

    @property
    def warnings(self) -> list[str]:
        """Why its estimates cannot be trusted."""
        return [
            f"{name.upper()}: {text}"
            for name, estimate in (self.run.get("estimates") or {}).items()
            for text in (estimate or {}).get("warnings", ())
        ]


@dataclass(frozen=True)
class Section:
    """What the page says of a pair of domains.

    Args:
        key: Its id.
        title: Both domains.
        sentences: What came out and what was chosen.
        tables: The methods, and the candidates of the choice.
        plots: Plots of all methods.
        curves: A plot for each logged term.
        details: Embeddings, confusion and calibration of each method.
        notes: What is missing.
    """

    key: str
    title: str
    sentences: Sequence[Sentence]
    tables: Sequence[Table]
    plots: Sequence[Shown]
    curves: Sequence[Shown]
    details: Sequence[Details]
    notes: Sequence[str]


def section_of(place: int, pair: Pair, folder: Path) -> tuple[Section, Numbers]:
    """Compute and draw all of a pair.

    Args:
        place: Its number on the page.
        pair: Its runs.
        folder: Where pictures are written.

    Returns:
        The section, and its numbers.
    """
    runs: list[Numbers] = []
    firsts: dict[str, tuple[Numbers, RunOutputs | None]] = {}
    for run in pair.runs:
        failed = "error" in run.result
        outputs, problem = (None, None) if failed else run.outputs()
        runs.append(numbers_of(run, outputs))
        if problem:
            runs[-1]["notes"].append(problem)
        if not failed:
            firsts.setdefault(run.method, (runs[-1], outputs))
    good = [run for run in runs if "error" not in run]
    drawer = _Drawer(folder, f"pair{place}", f"{place}-{_slug(pair.title)}")
    section = Section(
        key=f"pair{place}",
        title=pair.title,
        sentences=_sentences(good, pair),
        tables=[tables.methods(good), *tables.candidates(pair.choices)],
        plots=drawer.shown([draw("all", good) for draw in PER_PAIR]),
        curves=drawer.shown(plots.curve_plots("all", good)),
        details=_details(drawer, firsts, outcome.focus_of(good, pair.choices)),
        notes=[*pair.notes, *_notes(runs)],
    )
    names = {"source": pair.source, "target": pair.target}
    return section, {**names, "choices": list(pair.choices), "runs": runs}


def _sentences(runs: Sequence[Numbers], pair: Pair) -> list[Sentence]:
    levels = outcome.levels_of(runs, pair.choices)
    from_labels = [] if levels is None else [outcome.from_labels(levels)]
    if pair.source == pair.target:  # a task, which needs no choice without labels
        return from_labels
    choices = pair.choices
    return [outcome.chosen(choices), *outcome.estimated(runs, choices), *from_labels]


def _details(
    drawer: _Drawer, firsts: dict[str, tuple[Numbers, RunOutputs | None]], focus: str | None
) -> list[Details]:
    """The plots of each method, beside those of source only where they are compared."""
    numbers = [run for run, _ in firsts.values()]
    baseline = outcome.baseline_of(numbers)
    before = firsts[baseline][1] if baseline is not None else None
    found = []
    for place, (method, (run, after)) in enumerate(firsts.items()):
        key = f"{place}-{_slug(method)}"
        own: list[Plot | None] = []
        if baseline is not None and method != baseline and before and after:
            views = projected(before, after)
            own += plots.embedding_plots(key, baseline, run, *views) if views else []
        own += [draw(key, run) for draw in PER_METHOD]
        if shown := drawer.shown(own, pictures=method == focus):
            found.append(Details(run, method == focus, shown))
    return found


def _notes(runs: Sequence[Numbers]) -> list[str]:
    """What is missing, each thing once, with the runs that miss it."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for note in run["notes"]:
            found.setdefault(note, []).append(f"{run['method']}, seed {run['seed']}")
    return [
        f"{'All runs' if len(names) == len(runs) > 1 else '; '.join(names)}: {note}"
        for note, names in found.items()
    ]


def _slug(name: str) -> str:
    # Of any script: a file's name has so many bytes at most.
    short = re.sub(r"[^\w.]+", "_", name.lower()).strip("_").encode()[:60]
    return short.decode(errors="ignore")


@dataclass(frozen=True)
class _Drawer:
    """Draws plots for the page, and writes them as pictures beside it."""

    folder: Path
    key: str
    slug: str
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def shown(self, given: Sequence[Plot | None], pictures: bool = True) -> list[Shown]:
        """The plots that there are."""
        found = []
        for plot in given:
            if plot is not None:
                figure = plot.figure()
                if pictures:
                    drawing.save_png(figure, self.folder / f"{self.slug}-{plot.name}.png")
                key = f"{self.key}-{next(self.numbers)}"
                found.append(Shown(plot, drawing.svg(figure, key, plot.title, plot.description)))
        return found
