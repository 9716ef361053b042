"""Finished runs, as `hf-adapt run` leaves them on disk."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_adapt.experiments.outputs import (
    CHOICE_FILE,
    DIAGNOSTICS_FILE,
    LOGS_FILE,
    OUTPUTS_FILE,
    RESULT_FILE,
    RunOutputs,
)
from hf_adapt.experiments.summary import pair_name
from hf_adapt.report.shapes import CHOICE, DIAGNOSTICS, LOG_ENTRY, RESULT, misfit

ROLES = ("baseline", "adapted", "bound")
"""Of methods, as they are ordered: source only, and what trained on target labels, at the ends."""
NAMED_ROLES = {"source only": "baseline", "bound": "bound"}
"""By the names that the built-in experiments give such methods."""
UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged file of arrays raises."""


class ReportError(ValueError):
    """There is nothing to report on, or it is not what was expected."""


@dataclass(frozen=True)
class Run:
    """One run of a method on a pair of domains.

    Args:
        folder: Its folder.
        result: What `result.json` holds.
        logs: What its last stage logged; empty if that was not kept.
        diagnostics: What `diagnostics.json` holds, if it is there.
        notes: What is missing or cannot be read, in sentences.
    """

    folder: Path
    result: Mapping[str, Any]
    logs: Sequence[Mapping[str, Any]] = ()
    diagnostics: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()

    @property
    def method(self) -> str:
        """The name of its method."""
        return str(self.result["method"])

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.result["seed"])

    @property
    def pair(self) -> tuple[str, str]:
        """Source and target."""
        return str(self.result["source"]), str(self.result["target"])

    @property
    def role(self) -> str:
        """`"baseline"` for source only, `"bound"` if it trained on target labels, or `"adapted"`.

        Results that do not say so are told apart by the method's name.
        """
        role = self.result.get("role")
        return role if role in ROLES else NAMED_ROLES.get(self.method, "adapted")

    def outputs(self) -> tuple[RunOutputs | None, str | None]:
        """What the model gave for the rows; or None, and why."""
        if not (self.folder / OUTPUTS_FILE).exists():
            return None, f"{OUTPUTS_FILE} is missing, so only the scores are shown."
        try:
            return RunOutputs.load(self.folder), None
        except UNREADABLE as error:
            return None, f"{OUTPUTS_FILE} cannot be read ({error}), so only the scores are shown."


@dataclass(frozen=True)
class Pair:
    """All runs on a pair of domains.

    Args:
        source: The domain with labels.
        target: The domain without.
        runs: Its runs, by method and seed; the baseline first, the bound last.
        choices: What `choice.json` holds, one for each seed; none if it is not there.
        notes: What cannot be read.
    """

    source: str
    target: str
    runs: Sequence[Run]
    choices: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    @property
    def title(self) -> str:
        """Both domains, or the task."""
        return pair_name((self.source, self.target))


def find_pairs(paths: Sequence[Path]) -> tuple[list[Pair], list[str]]:
    """The runs below some folders.

    Args:
        paths: Folders of runs, of pairs, or output folders of experiments.

    Returns:
        The pairs, and notes about results that are left out.

    Raises:
        ReportError: If a folder has no run.
    """
    files = list(dict.fromkeys(file for path in paths for file in _result_files(path)))
    notes: list[str] = []
    newest: dict[tuple[tuple[str, str], str, int], Run] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, str(file))):
        try:
            run = _read_run(file.parent)
            key = (run.pair, run.method, run.seed)
        except (OSError, ValueError) as error:
            notes.append(f"{file} is no result of a run and is left out: {error}.")
            continue
        if key in newest:
            notes.append(
                f"{newest[key].folder} is left out: {run.folder.name} is a newer run of the same "
                "method, pair and seed."
            )
        newest[key] = run
    if not newest:
        raise ReportError(" ".join(notes))
    pairs = sorted({run.pair for run in newest.values()})
    return [_pair(pair, [r for r in newest.values() if r.pair == pair]) for pair in pairs], notes


def _result_files(path: Path) -> list[Path]:
    below = (RESULT_FILE, f"*/{RESULT_FILE}", f"*/*/{RESULT_FILE}")
    if found := sorted({f.absolute() for p in below for f in path.glob(p)}):
        return found
    if not path.is_dir():
        came = "a file lies there" if path.exists() else "there is no such folder"
    else:
        names = sorted(each.name for each in path.iterdir())
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        came = f"it holds {', '.join(names[:5])}{more}" if names else "it is empty"
    raise ReportError(
        f"{path} has no finished run: {came}. Expected {RESULT_FILE} in it, or in "
        f"PAIR/METHOD-seedN-…/ below it, as `hf-adapt run` writes them. Give the --output-dir of "
        "a run, or the folder of a pair or of one run in it."
    )


def _read_run(folder: Path) -> Run:
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    if isinstance(result, dict):  # null and NaN are as good as missing
        result = {k: each for k, each in result.items() if each is not None and each == each}
    if wrong := misfit(result, RESULT):
        raise ValueError(wrong)
    notes: list[str] = []
    logs = _read_optional(folder / LOGS_FILE, [LOG_ENTRY], notes)
    diagnostics = _read_optional(folder / DIAGNOSTICS_FILE, DIAGNOSTICS, notes)
    if not (folder / LOGS_FILE).exists() and "error" not in result:
        notes.append(f"{LOGS_FILE} is missing, so there are no curves of this run.")
    return Run(folder, result, logs or (), diagnostics, tuple(dict.fromkeys(notes)))


def _read_optional(file: Path, shape: Any, notes: list[str]) -> Any:
    """A JSON file of that shape; None if it is missing, or is something else, with a note."""
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{file.name} cannot be read: {error}.")
        return None
    if wrong := misfit(value, shape):
        notes.append(f"{file.name} is left out: {wrong}.")
        return None
    return value


def _pair(names: tuple[str, str], runs: Iterable[Run]) -> Pair:
    ordered = sorted(runs, key=lambda run: (ROLES.index(run.role), run.method, run.seed))
    notes: list[str] = []
    choices: list[Mapping[str, Any]] = []
    for folder in dict.fromkeys(run.folder.parent for run in ordered):
        choices += _read_optional(folder / CHOICE_FILE, [CHOICE], notes) or []
    shown = {run.folder.name for run in ordered}
    kept = [choice for choice in choices if (choice.get("run") or next(iter(shown))) in shown]
    if len(kept) < len(choices):
        notes.append(
            f"{len(choices) - len(kept)} of {len(choices)} choices in {CHOICE_FILE} are left out: "
            "they were made among other runs than these."
        )
    return Pair(*names, ordered, kept, tuple(notes))
