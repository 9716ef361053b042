"""Training and testing one model: the stages of a method, and its scores in both domains."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
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

from hf_adapt.alignment import adapt_pretrain
from hf_adapt.alignment import priors as alignment_priors
from hf_adapt.alignment.priors import PriorObjective
from hf_adapt.engine.callback import AdaptationCallback, adapt, collect_items
from hf_adapt.engine.item_outputs import ItemOutputs
from hf_adapt.engine.streams import Stream
from hf_adapt.evaluation.groups import WorstGroupAccuracy
from hf_adapt.evaluation.layers import FEWEST_ROWS, layer_distances
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.data import DataError, Pair, cached_pair, named_frequencies
from hf_adapt.experiments.memory import peak, restarted_peak
from hf_adapt.experiments.methods import (
    GIVEN,
    UNLABELLED,
    Method,
    is_shifted,
    reads_target,
    shifted,
)
from hf_adapt.experiments.outputs import DIAGNOSTICS_FILE, LOGS_FILE, RunOutputs
from hf_adapt.experiments.tasks import Task
from hf_adapt.models.groups import layer_groups
from hf_adapt.models.hub_names import check_hub_name
from hf_adapt.storage.text_file import write_text
from hf_adapt.unfreezing import FreezeOnly, GradualUnfreezing
from hf_adapt.unfreezing.prefix.cache import FrozenPrefix

PRETRAINING_EPOCHS = 10
GROUP = "hf_adapt_group"
NO_EVALUATION = {"eval_strategy": "no", "load_best_model_at_end": False}
"""`TrainingArguments` of a stage without rows to evaluate on."""


class ModelError(ValueError):
    """The model that every run starts from cannot be loaded."""


def check_model(experiment: Experiment) -> None:
    """Load the configuration and the tokenizer of the model once, before hundreds of runs fail.

    Raises:
        ModelError: If there is no such model, it is out of reach, or has too few layers.
    """
    try:
        check_hub_name(experiment.model)
        with _quiet():
            config = AutoConfig.from_pretrained(experiment.model)
            tasks = list(dict.fromkeys(map(experiment.task_of, experiment.data)))
            for task in tasks:
                task.processor(experiment.model)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The model {experiment.model!r} cannot be loaded: {error} Name a folder, or an id on "
            "the Hub, with model: or --model."
        ) from error
    if experiment.freeze_layers:
        with _quiet(), torch.device("meta"):
            model = tasks[0].model_class.from_config(config)
        first_groups(model, experiment.freeze_layers)


def check_priors(experiment: Experiment) -> None:
    """Resolve the class frequencies of every method on every pair, before anything is trained.

    Raises:
        DataError: If they are not those of the classes, or cannot be counted.
    """
    for source, target in experiment.pairs:
        pair = cached_pair(experiment, source, target)
        for name, method in experiment.methods.items():
            stage: Method | None = method
            while stage is not None:
                try:
                    resolved_priors(stage, pair, experiment.task_of(source))
                except DataError as error:
                    raise DataError(f"{name}, {source} → {target}: {error}") from error
                stage = stage.first


@dataclass(frozen=True)
class Run:
    """What the stages of one run share."""

    experiment: Experiment
    pair: Pair
    task: Task
    seed: int
    folder: Path
    processor: Any
    model: PreTrainedModel
    frozen: Sequence[str]

    @property
    def store(self) -> str | None:
        """The folder in which all runs keep what the frozen layers return, if they do."""
        return self.experiment.prefix_folder if self.frozen else None

    def rows(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """Rows as the model takes them."""
        return self.task.prepared(dataset, self.processor, self.experiment.max_length)

    def arguments(self, folder: Path, **settings: Any) -> TrainingArguments:
        """Training arguments of a stage."""
        settings = {**self.experiment.training, **settings}
        return TrainingArguments(output_dir=str(folder), seed=self.seed, **settings)


def train_and_test(
    experiment: Experiment, method: Method, seed: int, pair: Pair, task: Task, folder: Path
) -> dict[str, Any]:
    """Fine-tune once; return the scores in both domains and what the run cost.

    Args:
        experiment: How to train.
        method: What to train with.
        seed: The seed of the run.
        pair: The rows.
        task: What is predicted on them.
        folder: Where the model is saved, if it is.

    Raises:
        DataError: If the method needs labels that there are not.
    """
    if method.is_bound and not len(pair.target["train"]):
        raise DataError("The method trains on the labels of the target, which has none.")
    run = started(experiment, seed, pair, task, folder)
    trainer, cost = measured(run, lambda: _trained(run, method))
    result = {**cost, **tested(run, trainer, trainer.state.log_history)}
    shutil.rmtree(folder / "pretraining", ignore_errors=True)
    if experiment.save_models or method.save:
        trainer.save_model()
        result["model"] = str(folder)
    return result


def measured(run: Run, train: Callable[[], Trainer]) -> tuple[Trainer, dict[str, Any]]:
    """What `train` returns, and what it cost and warned of."""
    gc.collect()  # what earlier runs in this process left
    with _AdaptationWarnings() as warnings:
        device = "cuda" if run.arguments(run.folder).device.type == "cuda" else "cpu"
        before = restarted_peak(device)
        start = time.perf_counter()
        trainer = train()
        cost: dict[str, Any] = {"seconds": time.perf_counter() - start}
        cost["peak_memory_mb"] = None if before is None else peak(device) / 2**20
    cost["warnings"] = len(warnings.texts)
    cost["first_warning"] = warnings.texts[0] if warnings.texts else None
    return trainer, cost


def tested(run: Run, trainer: Trainer, logs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The scores of a trained model in both domains; what it gives and `logs` are written."""
    outputs = _outputs(run, trainer)
    outputs.save(run.folder)
    write_text(run.folder / LOGS_FILE, json.dumps(logs, indent=1))
    diagnostics: dict[str, Any] = {}
    if run.experiment.diagnose:
        diagnostics["layers"] = _layers(run, trainer)
    if run.pair.group_column is not None:
        diagnostics["group_column"] = run.pair.group_column
        diagnostics["groups"] = _group_accuracies(run, trainer.model, run.pair.test_groups)
    if diagnostics:
        write_text(run.folder / DIAGNOSTICS_FILE, json.dumps(diagnostics, ensure_ascii=False))
    result: dict[str, Any] = {}
    target = outputs.target_test or outputs.target_unlabelled  # one of them is there
    for name, found, tests in (
        ("source", outputs.source_test, True),
        ("target", target, outputs.target_test is not None),
    ):
        scores = {} if found is None else _scores(found, run.pair.labels, tests)
        result |= {f"{name}_{key}": value for key, value in scores.items()}
    return result


def started(experiment: Experiment, seed: int, pair: Pair, task: Task, folder: Path) -> Run:
    """The model before any training."""
    set_seed(seed)
    with _quiet():
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
    return Run(experiment, pair, task, seed, folder, processor, model, frozen)


def _trained(run: Run, method: Method) -> Trainer:
    """The trainer of the last stage, after all stages have been trained on the same model."""
    if method.first is not None:
        _trained(run, method.first)
    if method.pretrain is not None:
        folder = run.folder / "pretraining"
        given = {"num_train_epochs": PRETRAINING_EPOCHS, **method.pretrain, **NO_EVALUATION}
        texts = run.rows(run.pair.target_unlabelled)
        with contextlib.redirect_stdout(io.StringIO()), _frozen(run):  # its logs
            adapt_pretrain(run.model, run.processor, texts, run.arguments(folder, **given))
    trainer = _trainer(run, method)
    trainer.train()
    return trainer


def _trainer(run: Run, method: Method) -> Trainer:
    """The trainer of a stage."""
    pair = run.pair
    domain = pair.target if method.is_bound else pair.source
    unlabelled = method.train_on == UNLABELLED
    dev = domain["dev"] if len(domain["dev"]) and not unlabelled else None
    trainer = Trainer(
        model=run.model,
        args=run.arguments(
            run.folder, **{**method.training, **(NO_EVALUATION if dev is None else {})}
        ),
        train_dataset=run.rows(pair.target_unlabelled if unlabelled else domain["train"]),
        eval_dataset=None if dev is None else run.rows(dev),
        processing_class=run.processor,
        data_collator=run.task.collator(run.processor),
    )
    trainer.remove_callback(PrinterCallback)
    if run.store is not None:
        frozen = FreezeOnly(*run.frozen)
        adapt(trainer, GradualUnfreezing(frozen, cache_frozen_prefix=True, cache_dir=run.store))
    if method.adaptations:
        adaptations = method.build(lambda: copy.deepcopy(run.model))
        priors = resolved_priors(method, pair, run.task)
        if unlabelled:  # the rows are no stream, whose frequencies could be given
            for each in adaptations:
                if priors is not None and isinstance(each, PriorObjective):
                    each.prior = priors
            trainer.add_callback(AdaptationCallback(*adaptations))
        else:
            options: dict[str, Any] = {} if priors is None else {"target_priors": priors}
            if any(map(reads_target, adaptations)):
                rows = run.rows(pair.target_unlabelled)
                options["target_dataset"] = Stream(rows, **method.stream)
            trainer.add_callback(AdaptationCallback(*adaptations, **options))
    return trainer


def resolved_priors(method: Method, pair: Pair, task: Task) -> Any:
    """What `target_priors=` is given: class frequencies by name where they are counted.

    Raises:
        DataError: If they are to be counted, and the target has no labels; or if they are not those
            of the classes.
    """
    priors: Any = method.target_priors
    points = 0.0
    if is_shifted(priors):
        points, priors = float(priors[GIVEN]), GIVEN
    if isinstance(priors, Mapping):
        names = named_frequencies(priors)
        try:
            alignment_priors.resolved_priors(names, dict(enumerate(pair.labels)))
        except ValueError as error:
            raise DataError(str(error)) from error
        return names
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
        ModelError: If the model has no layers to train then.
    """
    if not count:
        return []
    groups = layer_groups(model)
    layers = [group for group in groups if group.kind == "layer"]
    if count >= len(layers):
        raise ModelError(f"freeze_layers: {count}, but the model has {len(layers)} layers.")
    lowest = layers[count].level
    return [group.name for group in groups if group.level < lowest]


def freeze(model: PreTrainedModel, groups: Sequence[str]) -> None:
    """Turn off the gradients of layer groups, for speed; their dropout stays on."""
    named = dict(model.named_parameters())
    for group in layer_groups(model):
        for name in group.parameters if group.name in groups else ():
            named[name].requires_grad_(False)


@contextlib.contextmanager
def _frozen_prefix(run: Run, trainer: Trainer) -> Iterator[None]:
    """Test rows are kept for the other runs as well, where training rows are."""
    if run.store is None:
        yield
        return
    groups = layer_groups(run.model)
    with _frozen(run):
        prefix = FrozenPrefix(trainer, run.model, groups, run.store)
        try:
            prefix.start_phase(frozenset(group.name for group in groups) - {*run.frozen})
            with prefix.serving("all"):
                yield
        finally:
            prefix.close()


@contextlib.contextmanager
def _frozen(run: Run) -> Iterator[None]:
    """The first layers do not train meanwhile, where the cache of their output freezes them."""
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    freeze(run.model, run.frozen)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _layers(run: Run, trainer: Trainer) -> list[dict[str, Any]]:
    """The distance of the domains in every layer; none of too few rows."""
    rows = run.rows(run.pair.source["test"]), run.rows(run.pair.target_unlabelled)
    if min(map(len, rows)) < FEWEST_ROWS:
        return []
    return [dataclasses.asdict(each) for each in layer_distances(trainer, *rows)]


def _group_accuracies(run: Run, model: Any, groups: Sequence[str | None]) -> dict[str, Any]:
    """The accuracy on each group of the target's test rows; none of rows without groups."""
    if not any(group is not None for group in groups):
        return {}
    observer = WorstGroupAccuracy(GROUP)
    trainer = tester(run, model)
    trainer.add_callback(AdaptationCallback(observer))
    rows = run.rows(run.pair.target["test"])
    with _AdaptationWarnings():  # of small groups: the report has their intervals
        trainer.evaluate(rows.add_column(GROUP, list(groups)))
    found = () if observer.result is None else observer.result.groups
    return {each.name: dataclasses.asdict(each) for each in found}


def _outputs(run: Run, trainer: Trainer) -> RunOutputs:
    """What the trained model gives for the rows of both domains."""
    pair = run.pair
    with _AdaptationWarnings(), _frozen_prefix(run, trainer):
        dev, test = (_collected(run, trainer, pair.source[split]) for split in ("dev", "test"))
        if pair.is_one:
            return RunOutputs(source_dev=dev, source_test=test, target_test=test)
        return RunOutputs(
            source_dev=dev,
            source_test=test,
            target_unlabelled=_unlabelled(run, trainer),
            target_test=_collected(run, trainer, pair.target["test"]),
        )


def _collected(run: Run, trainer: Trainer, rows: datasets.Dataset) -> ItemOutputs | None:
    """What the model gives for rows; None if there are none."""
    if not len(rows):
        return None
    rows = run.rows(rows)
    if "input_ids" in rows.column_names:  # rows of like length in a batch: less padding
        lengths = [len(tokens) for tokens in rows["input_ids"]]
        rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
    found = collect_items(trainer, rows)
    labelled = found.labelled  # of the tokens of a word only the first has a label
    return labelled if len(labelled) else found


def _unlabelled(run: Run, trainer: Trainer) -> ItemOutputs | None:
    """What the model gives for the target's rows, whose labels nothing sees."""
    found = _collected(run, trainer, run.task.with_any_labels(run.pair.target_unlabelled))
    return None if found is None else found.without_labels


def untrained_outputs(experiment: Experiment, source: str, target: str) -> ItemOutputs | None:
    """What the model gives for the target's unlabelled rows before any training."""
    pair = cached_pair(experiment, source, target)
    with tempfile.TemporaryDirectory() as folder:
        task = experiment.task_of(source)
        run = started(experiment, experiment.seeds[0], pair, task, Path(folder))
        freeze(run.model, run.frozen)
        return _unlabelled(run, tester(run, run.model))


def tester(run: Run, model: PreTrainedModel) -> Trainer:
    """A Trainer that only runs a model."""
    trainer = Trainer(
        model,
        run.arguments(run.folder, **NO_EVALUATION),
        data_collator=run.task.collator(run.processor),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _scores(items: ItemOutputs, labels: Sequence[str], is_scored: bool) -> dict[str, Any]:
    """Accuracy, macro-F1 and class shares; without labels only the shares that are predicted."""
    guess, truth = items.logits.argmax(1).numpy(), items.labels.numpy()
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
