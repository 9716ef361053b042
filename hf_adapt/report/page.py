"""The page: its sections, the pictures and the numbers beside it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hf_adapt.experiments.summary import Score, marked, percent, scores_of
from hf_adapt.experiments.versions import installed
from hf_adapt.report import drawing, figures, words
from hf_adapt.report.drawing import Column, Plot, Table, printable
from hf_adapt.report.embedding import projected
from hf_adapt.report.figures import mean_estimate, methods_of, number
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
        accuracies=_accuracies(numbers),
        flagged=_flagged(numbers),
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
    good = [run for run in runs if not run["error"]]
    plots = _Plots(folder, key, _slug(pair.title))
    firsts: dict[str, tuple[Numbers, Any]] = {}
    for run, each in zip(runs, outputs, strict=True):
        if not run["error"]:
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
        tables=[_methods(good), *_candidates(pair.choice)],
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


# ---------------------------------------------------------------- tables
def _accuracies(pairs: Sequence[Numbers]) -> Table | None:
    """Accuracy on the target: methods × pairs."""
    good = [[run for run in pair["runs"] if not run["error"]] for pair in pairs]
    if not any(run["oracle"]["accuracy"] is not None for runs in good for run in runs):
        return None
    order = ("baseline", "adapted", "bound")
    every = sorted((run for runs in good for run in runs), key=lambda run: order.index(run["role"]))
    methods = list(dict.fromkeys(run["method"] for run in every))
    columns = [Column("method", numeric=False)]
    columns += [Column(f"{pair['source']} → {pair['target']}", oracle=True) for pair in pairs]
    rows = []
    for method in methods:
        cells = []
        for pair in pairs:
            own = [run for run in pair["runs"] if run["method"] == method]
            score = percent(scores_of([r["oracle"] for r in own if not r["error"]], "accuracy"))
            cells.append(_flags(score, own) if own else "–")
        rows.append([method, *cells])
    return Table("Accuracy on the target, %: mean ± standard deviation over seeds", columns, rows)


def _flags(text: str, runs: Sequence[Numbers]) -> str:
    """A cell with how many of its runs failed, were warned of, or collapsed."""
    failed = [{**run, "error": run["error"]} if run["error"] else _without(run) for run in runs]
    text = marked(text, failed)
    collapsed = sum(bool(run.get("collapsed")) for run in runs)
    return f"{text} ({collapsed} collapsed)" if collapsed else text


def _without(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "error"}


def _methods(runs: Sequence[Numbers]) -> Table:
    """What is known of each method without target labels, and with them."""
    heads = ("runs", "source acc. %", "ATC %", "IWV %", "A-distance", "collapsed")
    oracle = ("accuracy %", "gain", "F1 %", "ECE %")
    reference = [r["oracle"] for r in runs if r["role"] == "baseline"]
    low = scores_of(reference, "accuracy")
    columns = [Column("method", numeric=False), *map(Column, heads)]
    columns += [Column(head, oracle=True) for head in oracle]
    rows = []
    for method, own in methods_of(runs).items():
        known = [run["oracle"] for run in own]
        calibration = [each.get("calibration") or {} for each in known]
        accuracy = scores_of(known, "accuracy")
        distances = scores_of(own, "a_distance")
        rows.append(
            [
                method,
                str(len(own)),
                percent(scores_of(own, "source_accuracy")),
                *(_interval(mean_estimate(own, name)) for name in ("atc", "iwv")),
                number(None if distances is None else distances["mean"], 2),
                str(sum(bool(run.get("collapsed")) for run in own) or "–"),
                percent(accuracy),
                _gain(accuracy, low) if own[0]["role"] != "baseline" else "–",
                percent(scores_of(known, "f1")),
                percent(scores_of(calibration, "ece")),
            ]
        )
    bound = figures.trained_on_target(runs)
    marked_rows = [place for place, row in enumerate(rows) if row[0] in bound]
    return Table("Methods: means over seeds", columns, rows, oracle_rows=marked_rows)


def _gain(score: Score | None, low: Score | None) -> str:
    if score is None or low is None or score["mean"] is None or low["mean"] is None:
        return "–"
    return f"{100 * (score['mean'] - low['mean']):+.1f}"


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "–"
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def _candidates(choice: Mapping[str, Any] | None) -> list[Table]:
    """What the choice says of each candidate."""
    candidates = (choice or {}).get("candidates") or []
    if not candidates or choice is None:
        return []
    names = list(dict.fromkeys(name for each in candidates for name in each.get("scores") or {}))
    rows = []
    for each in candidates:
        scores = each.get("scores") or {}
        verdict = "kept" if each.get("kept") else "dropped"
        is_chosen = each["name"] == choice.get("chosen")
        rows.append(
            [
                str(each["name"]),
                "chosen" if is_chosen else verdict,
                str(each.get("reason") or ""),
                *(number(scores.get(name)) for name in names),
            ]
        )
    heads = [Column(text, numeric=False) for text in ("candidate", "verdict", "why")]
    return [Table("The choice without target labels", [*heads, *map(Column, names)], rows)]


def _flagged(pairs: Sequence[Numbers]) -> Table | None:
    """Runs that failed, collapsed or were warned of, by name."""
    rows = []
    for pair in pairs:
        for run in pair["runs"]:
            name = [f"{pair['source']} → {pair['target']}", run["method"], str(run["seed"])]
            if run["error"]:
                rows.append([*name, "failed", str(run["error"])])
            if run.get("collapsed"):
                rows.append([*name, "collapsed", run["collapsed"]])
            if run["warnings"]:
                count = f"warned ({run['warnings']})" if run["warnings"] > 1 else "warned"
                rows.append([*name, count, str(run["first_warning"])])
    heads = ("pair", "method", "seed", "what", "text")
    columns = [Column(head, numeric=head == "seed") for head in heads]
    return Table("Runs that failed, collapsed or were warned of", columns, rows) if rows else None
