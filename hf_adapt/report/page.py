"""The page: its sections, the pictures and the numbers beside it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hf_adapt.experiments.versions import installed
from hf_adapt.report import drawing, figures, tables, words
from hf_adapt.report.drawing import Plot, Table, printable
from hf_adapt.report.embedding import projected
from hf_adapt.report.numbers import Numbers, numbers_of, plain
from hf_adapt.report.runs import Pair, find_pairs
from hf_adapt.storage.text_file import write_text

PAGE, NUMBERS = "report.html", "report.json"


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
        warnings: Why its estimates cannot be trusted.
    """

    run: Numbers
    is_open: bool
    plots: Sequence[Shown]
    warnings: Sequence[str]


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
    sentences: Sequence[words.Sentence]
    tables: Sequence[Table]
    plots: Sequence[Shown]
    curves: Sequence[Shown]
    details: Sequence[Details]
    notes: Sequence[str]


def write_report(paths: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write a page about finished runs, and its plots and numbers beside it.

    Labels of target rows change nothing on the page but what is marked as the oracle's.

    Args:
        paths: Output folders of `hf-adapt run`, or folders of pairs or of runs in them.
        output: The folder to write `report.html`, `report.json` and `*.png` to; `report/` in the
            first of the paths by default.

    Returns:
        The page.

    Raises:
        ReportError: If a folder has no run.
    """
    pairs, notes = find_pairs([Path(path) for path in paths])
    folder = Path(output) if output is not None else Path(paths[0], "report")
    folder.mkdir(parents=True, exist_ok=True)
    sections, numbers = [], []
    with drawing.style():
        for place, pair in enumerate(pairs, 1):
            section, found = _section(f"pair{place}", pair, folder)
            sections.append(section)
            numbers.append(found)
    every = [run for found in numbers for run in found["runs"]]
    facts = {"pairs": numbers, "notes": notes, "versions": installed()}
    write_text(folder / NUMBERS, json.dumps(plain(facts), indent=1, allow_nan=False))
    page = _template().render(
        title=f"Adaptation report: {words.listed([pair.title for pair in pairs], 3)}",
        compared=words.compared(pairs, every),
        health=words.health(every),
        accuracies=tables.accuracies(numbers),
        flagged=tables.flagged(numbers),
        sections=sections,
        notes=notes,
        versions=", ".join(f"{name} {version}" for name, version in installed().items()),
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    return environment.get_template("page.html")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name.lower()).strip("_") or "unnamed"


# ---------------------------------------------------------------- a pair
def _section(key: str, pair: Pair, folder: Path) -> tuple[Section, Numbers]:
    """Compute and draw all of a pair; the outputs of its runs are in memory meanwhile alone."""
    runs, outputs = [], []
    for run in pair.runs:
        loaded, problem = run.outputs() if "error" not in run.result else (None, None)
        runs.append(numbers_of(run, loaded))
        runs[-1]["notes"] += [problem] if problem else []
        outputs.append(loaded)
    good = [run for run in runs if "error" not in run]
    plots = _Plots(folder, key, _slug(pair.title))
    firsts: dict[str, tuple[Numbers, Any]] = {}
    for run, each in zip(runs, outputs, strict=True):
        if "error" not in run:
            firsts.setdefault(run["method"], (run, each))
    baseline = firsts.get(words.baseline_of(good) or "")
    focus = words.focus_of(good, pair.choice)
    details = []
    for place, (method, (run, each)) in enumerate(firsts.items()):
        name, own = f"{place}-{_slug(method)}", list[Plot | None]()
        views = None
        if baseline and baseline[1] and each and run is not baseline[0]:
            views = projected(baseline[1], each)
        if views is not None:
            own += figures.embedding_plots(name, baseline[0]["method"], run, *views)
        own += [draw(name, run) for draw in PER_METHOD]
        shown = plots.shown(own, pictures=method == focus)
        if shown:
            warned = [
                f"{name.upper()}: {text}"
                for name, estimate in (run.get("estimates") or {}).items()
                for text in (estimate or {}).get("warnings", ())
            ]
            details.append(Details(run, method == focus, shown, warned))
    section = Section(
        key=key,
        title=pair.title,
        sentences=[words.chosen(pair), *words.outcome(good, pair.choice)],
        tables=[tables.methods(good), *tables.candidates(pair.choice)],
        plots=plots.shown([draw("all", good) for draw in PER_PAIR]),
        curves=plots.shown(figures.curve_plots("all", good)),
        details=details,
        notes=[*pair.notes, *_notes(runs)],
    )
    choice = pair.choice
    return section, {"source": pair.source, "target": pair.target, "choice": choice, "runs": runs}


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


PER_PAIR = (figures.accuracy_plot, figures.shares_plot, figures.layers_plot)
PER_METHOD = (figures.confusion_plot, figures.calibration_plot, figures.groups_plot)


@dataclass(frozen=True)
class _Plots:
    """Draws plots for the page, and writes them as pictures beside it."""

    folder: Path
    key: str
    slug: str
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def shown(self, plots: Sequence[Plot | None], pictures: bool = True) -> list[Shown]:
        """The plots that there are."""
        found = []
        for plot in plots:
            if plot is not None:
                figure = plot.figure()
                if pictures:
                    drawing.save_png(figure, self.folder / f"{self.slug}-{plot.name}.png")
                key = f"{self.key}-{next(self.numbers)}"
                found.append(Shown(plot, drawing.svg(figure, key, plot.title, plot.description)))
        return found
