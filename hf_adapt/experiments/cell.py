"""One cell of a table: one method, one pair of domains, one seed."""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.data import Pair, cached_pair
from hf_adapt.experiments.joint_training import train_together
from hf_adapt.experiments.outputs import DIAGNOSTICS_FILE, OUTPUTS_FILE, RESULT_FILE
from hf_adapt.experiments.summary import pair_name
from hf_adapt.experiments.tasks import Task
from hf_adapt.experiments.training import train_and_test
from hf_adapt.experiments.versions import installed
from hf_adapt.storage.text_file import write_text


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Args:
        source: The domain whose labels are trained on.
        target: The domain to adapt to.
        method: The name of the method.
        seed: The seed of the run.
    """

    source: str
    target: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{pair_name((self.source, self.target))}, {self.method}, seed {self.seed}"


def cell_folder(experiment: Experiment, cell: Cell) -> Path:
    """The folder of a cell, whose name changes with whatever changes its result."""
    method = experiment.methods[cell.method]
    pair = cached_pair(experiment, cell.source, cell.target)
    described = {
        "model": model_fingerprint(experiment.model),
        "task": experiment.kind_of(cell.source),
        "rows": _rows_fingerprint(pair, experiment.task_of(cell.source)),
        "labels": pair.labels,
        "method": method.described(),
        "training": {**experiment.training, **method.training},
        "freeze_layers": experiment.freeze_layers,
        "cache_prefix": experiment.cache_prefix,
        "max_length": experiment.max_length,
        "versions": installed(),
    }
    if method.mixes:
        described["mixture"] = experiment.mixture
        described["tasks"] = {
            task: [
                experiment.kind_of(task),
                _rows_fingerprint(cached_pair(experiment, task, task), experiment.task_of(task)),
            ]
            for task in experiment.data
        }
    text = json.dumps(described, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    names = dict.fromkeys((_slug(cell.source), _slug(cell.target)))
    run = f"{_slug(cell.method)}-seed{cell.seed}-{digest}"
    return Path(experiment.output_dir, "-".join(names), run)


def reference_file(experiment: Experiment, source: str, target: str) -> Path:
    """Where the outputs of the untrained model for a pair's target are kept."""
    pair = cached_pair(experiment, source, target)
    described = [
        model_fingerprint(experiment.model),
        _rows_fingerprint(pair, experiment.task_of(source)),
        experiment.max_length,
    ]
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:10]
    folder = f"{_slug(source)}-{_slug(target)}"
    return Path(experiment.output_dir, folder, f"untrained-{digest}.npz")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name.lower()).strip("_") or "unnamed"


def model_fingerprint(model: str) -> str:
    """The id of a model, or a hash of the files in its folder."""
    if not Path(model).is_dir():
        return model
    files = sorted(file for file in Path(model).iterdir() if file.is_file())
    return _files_hash(tuple((file, file.stat().st_mtime_ns) for file in files))


@lru_cache
def _files_hash(files: tuple[tuple[Path, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, _ in files:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@cache
def _rows_fingerprint(pair: Pair, task: Task) -> str:
    splits = [*pair.source.values(), *pair.target.values(), pair.target_unlabelled]
    described = [[task.described(row) for row in rows] for rows in splits]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


# ---------------------------------------------------------------- running
def run_cells(
    experiment: Experiment, cells: Sequence[Cell], folders: Sequence[Path]
) -> list[dict[str, Any]]:
    """Train and test once; write the result, or the error, to the folder of each cell.

    Args:
        experiment: How to train.
        cells: What is trained together: all tasks of a mixture; any other cell is alone.
        folders: Their folders.

    Returns:
        A result for each; with the key `error` if the run failed.
    """
    method, seed = experiment.methods[cells[0].method], cells[0].seed
    is_baseline = method.is_baseline or cells[0].method == experiment.baseline
    role = "baseline" if is_baseline else "bound" if method.is_bound else "adapted"
    results: list[dict[str, Any]] = [
        {
            "source": cell.source,
            "target": cell.target,
            "method": cell.method,
            "role": role,
            "seed": cell.seed,
        }
        for cell in cells
    ]
    try:
        if method.mixes:
            places = {cell.source: folder for cell, folder in zip(cells, folders, strict=True)}
            found = train_together(experiment, method, seed, places)
        else:
            pair = cached_pair(experiment, cells[0].source, cells[0].target)
            task = experiment.task_of(cells[0].source)
            found = [train_and_test(experiment, method, seed, pair, task, folders[0])]
        results = [{**result, **own} for result, own in zip(results, found, strict=True)]
    except Exception as error:  # one run that fails must not end the others
        for result, folder in zip(results, folders, strict=True):
            result["error"] = f"{type(error).__name__}: {error}"
            write_text(folder / "error.txt", traceback.format_exc())
    else:
        for folder in folders:
            (folder / "error.txt").unlink(missing_ok=True)
    for result, folder in zip(results, folders, strict=True):
        write_text(folder / RESULT_FILE, json.dumps(result, indent=2, ensure_ascii=False))
    return results


def files_of(experiment: Experiment, cell: Cell) -> list[str]:
    """The names of the files that a finished run has."""
    saves = experiment.save_models or experiment.methods[cell.method].save
    names = [RESULT_FILE, OUTPUTS_FILE]
    diagnoses = experiment.diagnose or experiment.group_column_of(cell.target) is not None
    return [*names, *["config.json"] * saves, *[DIAGNOSTICS_FILE] * diagnoses]


def finished_result(
    folder: Path, files: Iterable[str], group_column: str | None = None
) -> dict[str, Any] | None:
    """The result of an earlier run; None if there is none, or it failed, or a file is missing.

    A result that is cut off or damaged is none, and one without the accuracies of these groups.
    """
    if not all((folder / name).exists() for name in files):
        return None
    try:
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        if group_column is not None:
            found = json.loads((folder / DIAGNOSTICS_FILE).read_text(encoding="utf-8"))
            if found.get("group_column") != group_column:
                return None
    except ValueError:  # no JSON, or no UTF-8
        return None
    is_whole = isinstance(result, dict) and "warnings" in result
    return result if is_whole and "error" not in result else None
