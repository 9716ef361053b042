"""One cell of a table: one method, one pair of domains, one seed."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import transformers
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.engine.streams import Stream
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.data import DataError, Pair, load_pair
from hf_adapt.experiments.memory import peak, restarted_peak
from hf_adapt.experiments.methods import GIVEN, Method, shifted
from hf_adapt.experiments.tasks import TASKS, Task
from hf_adapt.experiments.versions import installed
from hf_adapt.models.groups import layer_groups
from hf_adapt.models.hub_names import check_hub_name
from hf_adapt.storage.text_file import write_text
from hf_adapt.unfreezing import FreezeOnly, GradualUnfreezing

RESULT_FILE = "result.json"
DOMAINS = ("source", "target")


class ModelError(ValueError):
    """The model that every run starts from cannot be loaded."""


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
        return f"{self.source} → {self.target}, {self.method}, seed {self.seed}"


def cell_folder(experiment: Experiment, cell: Cell) -> Path:
    """The folder of a cell, whose name changes with whatever changes its result."""
    method = experiment.methods[cell.method]
    pair = cached_pair(experiment, cell.source, cell.target)
    described = {
        "model": model_fingerprint(experiment.model),
        "task": experiment.task,
        "rows": _rows_fingerprint(pair, TASKS[experiment.task]),
        "method": method.described(),
        "training": {**experiment.training, **method.training},
        "freeze_layers": experiment.freeze_layers,
        "cache_prefix": experiment.cache_prefix,
        "max_length": experiment.max_length,
        "versions": installed(),
    }
    text = json.dumps(described, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    names = [f"{_slug(cell.source)}-{_slug(cell.target)}", f"{_slug(cell.method)}-seed{cell.seed}"]
    return Path(experiment.output_dir, names[0], f"{names[1]}-{digest}")


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


_PAIRS: dict[str, Pair] = {}


def cached_pair(experiment: Experiment, source: str, target: str) -> Pair:
    """The rows of a pair, read once in a process, and again when a file has changed."""
    limits = (experiment.num_train, experiment.num_test, experiment.balanced, experiment.task)
    domains = [experiment.data[name] for name in (source, target)]
    files = [Path(name) for each in domains for name in (each.train, each.dev, each.test) if name]
    changed = [file.stat().st_mtime_ns for file in files if file.exists()]
    key = repr((domains, limits, changed))
    if key not in _PAIRS:
        _PAIRS[key] = load_pair(experiment, source, target)
    return _PAIRS[key]


@cache
def _rows_fingerprint(pair: Pair, task: Task) -> str:
    splits = [*pair.source.values(), *pair.target.values(), pair.target_unlabelled]
    described = [[task.described(row) for row in rows] for rows in splits]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def check_model(experiment: Experiment) -> None:
    """Load the configuration and the tokenizer of the model once, before hundreds of runs fail.

    Raises:
        ModelError: If there is no such model, or it is out of reach.
    """
    try:
        check_hub_name(experiment.model)
        with _quiet():
            AutoConfig.from_pretrained(experiment.model)
            TASKS[experiment.task].processor(experiment.model)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The model {experiment.model!r} cannot be loaded: {error} Name a folder, or an id on "
            "the Hub, with model: or --model."
        ) from error


# ---------------------------------------------------------------- running
def run_cell(experiment: Experiment, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train and test once; write the result, or the error, to the cell's folder.

    Returns:
        The result; with the key `error` if the run failed.
    """
    result: dict[str, Any] = {
        "source": cell.source,
        "target": cell.target,
        "method": cell.method,
        "seed": cell.seed,
    }
    try:
        result |= train_and_test(experiment, cell, folder)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        write_text(folder / "error.txt", traceback.format_exc())
    else:
        (folder / "error.txt").unlink(missing_ok=True)
    write_text(folder / RESULT_FILE, json.dumps(result, indent=2, ensure_ascii=False))
    return result


def finished_result(folder: Path, with_model: bool = False) -> dict[str, Any] | None:
    """The result of an earlier run; None if there is none, or it failed, or a model is missing."""
    file = folder / RESULT_FILE
    if not file.exists() or (with_model and not (folder / "config.json").exists()):
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return None if "error" in result else result


def train_and_test(experiment: Experiment, cell: Cell, folder: Path) -> dict[str, Any]:
    """Fine-tune once; return the scores in both domains and what the run cost."""
    method = experiment.methods[cell.method]
    task = TASKS[experiment.task]
    pair = cached_pair(experiment, cell.source, cell.target)
    if method.is_bound and not len(pair.target["train"]):
        raise DataError(f"{cell.method!r} trains on the labels of {cell.target!r}, which has none.")
    with _quiet():
        trainer, rows = _new_trainer(experiment, cell, pair, task, folder)
    gc.collect()  # what earlier runs in this process left
    with _AdaptationWarnings() as warnings:
        device = "cuda" if trainer.args.device.type == "cuda" else "cpu"
        before = restarted_peak(device)
        start = time.perf_counter()
        trainer.train()
        result: dict[str, Any] = {"seconds": time.perf_counter() - start}
        result["peak_memory_mb"] = None if before is None else peak(device) / 2**20
    for name, domain in zip(DOMAINS, (pair.source, pair.target), strict=True):
        tested, is_scored = domain["test"], len(domain["test"]) > 0
        if not is_scored:
            tested = task.with_any_labels(pair.target_unlabelled)
        scores = _scores(trainer, rows(tested), task, pair.labels, is_scored)
        result |= {f"{name}_{key}": value for key, value in scores.items()}
    result["warnings"] = len(warnings.texts)
    result["first_warning"] = warnings.texts[0] if warnings.texts else None
    if experiment.save_models:
        trainer.save_model()
        result["model"] = str(folder)
    return result


def _new_trainer(
    experiment: Experiment, cell: Cell, pair: Pair, task: Task, folder: Path
) -> tuple[Trainer, Any]:
    """The trainer, and the function that prepares rows for it."""
    method = experiment.methods[cell.method]
    set_seed(cell.seed)
    processor = task.processor(experiment.model)
    model = task.model_class.from_pretrained(
        experiment.model,
        id2label=dict(enumerate(pair.labels)),
        label2id={label: i for i, label in enumerate(pair.labels)},
        ignore_mismatched_sizes=True,
    )
    frozen = first_groups(model, experiment.freeze_layers)
    if not experiment.cache_prefix:
        freeze(model, frozen)

    def rows(dataset: datasets.Dataset) -> datasets.Dataset:
        return task.prepared(dataset, processor, experiment.max_length)

    trained = pair.target if method.is_bound else pair.source
    settings = {**experiment.training, **method.training}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), seed=cell.seed, **settings),
        train_dataset=rows(trained["train"]),
        eval_dataset=rows(trained["dev"]) if len(trained["dev"]) else None,
        processing_class=processor,
        data_collator=task.collator(processor),
    )
    trainer.remove_callback(PrinterCallback)
    if experiment.cache_prefix and frozen:
        store = str(Path(experiment.output_dir, "frozen_prefix"))
        prefix = GradualUnfreezing(FreezeOnly(*frozen), cache_frozen_prefix=True, cache_dir=store)
        trainer.add_callback(AdaptationCallback(prefix))
    if method.adaptations:
        options: dict[str, Any] = {}
        priors = resolved_priors(method, pair, task)
        if priors is not None:
            options["target_priors"] = priors
        target = rows(pair.target_unlabelled)
        stream = Stream(target, **method.stream) if method.stream else target
        trainer.add_callback(AdaptationCallback(*method.build(), target_dataset=stream, **options))
    return trainer, rows


def resolved_priors(method: Method, pair: Pair, task: Task) -> Any:
    """What `target_priors=` is given: class frequencies by name where they are counted.

    Raises:
        DataError: If they are to be counted, and the target has no labels.
    """
    priors: Any = method.target_priors
    points = 0.0
    if isinstance(priors, Mapping) and set(priors) == {GIVEN}:
        points, priors = float(priors[GIVEN]), GIVEN
    if priors != GIVEN:
        return priors
    if not len(pair.target["train"]):
        raise DataError(
            "target_priors: given counts the labels of the target's training rows, which has none. "
            "Give the class frequencies, such as {spam: 0.13, ham: 0.87}."
        )
    return shifted(pair.target_shares(task), points)


def first_groups(model: PreTrainedModel, count: int) -> list[str]:
    """The layer groups of the embeddings and of the first layers; none for 0 layers.

    Raises:
        ValueError: If the model has no layers to train then.
    """
    if not count:
        return []
    groups = layer_groups(model)
    layers = [group for group in groups if group.kind == "layer"]
    if count >= len(layers):
        raise ValueError(f"freeze_layers: {count}, but the model has {len(layers)} layers.")
    lowest = layers[count].level
    return [group.name for group in groups if group.level < lowest]


def freeze(model: PreTrainedModel, groups: Sequence[str]) -> None:
    """Turn off the gradients of layer groups, for speed; their dropout stays on."""
    named = dict(model.named_parameters())
    for group in layer_groups(model):
        for name in group.parameters if group.name in groups else ():
            named[name].requires_grad_(False)


def _scores(
    trainer: Trainer, rows: datasets.Dataset, task: Task, labels: Sequence[str], is_scored: bool
) -> dict[str, Any]:
    """Accuracy, macro-F1 and class shares; without labels only the shares that are predicted."""
    predicted = trainer.predict(rows)
    logits = predicted.predictions
    guess, truth = task.decoded(
        logits[0] if isinstance(logits, tuple) else logits, predicted.label_ids
    )
    scores: dict[str, Any] = {"predicted_shares": _shares(guess, labels)}
    if is_scored:
        scores["true_shares"] = _shares(truth, labels)
        scores["accuracy"] = float(accuracy_score(truth, guess))
        scores["f1"] = float(f1_score(truth, guess, average="macro"))
    return scores


def _shares(numbers: npt.NDArray[np.int64], labels: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(numbers, minlength=len(labels))
    return dict(zip(labels, (counts / len(numbers)).tolist(), strict=True))


class _quiet:
    """No bars, and no message that the head is new, while a model is loaded."""

    def __enter__(self) -> None:
        datasets.disable_progress_bars()
        logs: Any = transformers.logging
        logs.disable_progress_bar()
        self._level = logs.get_verbosity()
        logs.set_verbosity_error()

    def __exit__(self, *error: object) -> None:
        logs: Any = transformers.logging
        logs.set_verbosity(self._level)


class _AdaptationWarnings(logging.Handler):
    """Collects the warnings of hf_adapt instead of printing them among the progress."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note the text; what the cache of frozen layers has to say is not about a method."""
        if not record.name.startswith("hf_adapt.unfreezing.prefix"):
            self.texts.append(record.getMessage())

    def __enter__(self) -> _AdaptationWarnings:
        logging.getLogger("hf_adapt").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("hf_adapt").removeHandler(self)
