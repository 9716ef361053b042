"""The page: what the first screen says, and the numbers beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from hf_adapt.experiments.versions import installed
from hf_adapt.report import drawing, outcome, tables, words
from hf_adapt.report.drawing import printable
from hf_adapt.report.numbers import plain
from hf_adapt.report.runs import find_pairs
from hf_adapt.report.section import section_of
from hf_adapt.storage.text_file import write_text

PAGE, NUMBERS = "report.html", "report.json"


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
            section, found = section_of(place, pair, folder)
            sections.append(section)
            numbers.append(found)
    every = [run for found in numbers for run in found["runs"]]
    facts = {"pairs": numbers, "notes": notes, "versions": installed()}
    write_text(folder / NUMBERS, json.dumps(plain(facts), indent=1, allow_nan=False))
    page = _template().render(
        title=f"Adaptation report: {words.listed([pair.title for pair in pairs], 3)}",
        compared=words.compared(pairs, every),
        health=words.health(every),
        overall=outcome.overall(numbers),
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
