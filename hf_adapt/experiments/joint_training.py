"""Training and testing one model of several tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer

from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.data import DataError, cached_pair
from hf_adapt.experiments.methods import Method
from hf_adapt.experiments.mixture import mixed
from hf_adapt.experiments.training import NO_EVALUATION, Run, measured, started, tested, tester
from hf_adapt.multitask import Mixture, MultiTask, TaskSpec

OWN_HEAD = "sequence-classification"
"""The task whose model is loaded, if there is one: its head needs a pooler, which others lack."""


def mixtures_of(experiment: Experiment) -> dict[str, Mixture]:
    """The rows that each method which trains several tasks together would see.

    Raises:
        DataError: If a task has no rows in an epoch, or none to test on.
    """
    made = {}
    for name, method in experiment.methods.items():
        if not method.mixes:
            continue
        pairs = {task: cached_pair(experiment, task, task) for task in experiment.data}
        made[name] = _mixture(
            experiment, method, {task: pair.source["train"] for task, pair in pairs.items()}
        )
        for task, quota in zip(pairs, made[name].quotas(0), strict=True):
            if not quota:
                raise DataError(
                    f"{name}: the task {task!r} has no row among the {made[name].size} of an "
                    "epoch. Give it a share with mixture: {sampling: …}, or make size larger."
                )
        for task, pair in pairs.items():
            if not len(pair.source["test"]):
                raise DataError(f"The task {task!r} has no labelled row to test on.")
    return made


def _mixture(
    experiment: Experiment, method: Method, rows: Mapping[str, Any], seed: int = 0
) -> Mixture:
    return mixed({**(experiment.mixture or {}), **(method.mixture or {})}, rows, seed)


def train_together(
    experiment: Experiment, method: Method, seed: int, folders: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Fine-tune once on all tasks; return the scores of each, and its share of the seconds.

    Args:
        experiment: How to train.
        method: What to train with; a `MultiTask` is among its adaptations.
        seed: The seed of the run.
        folders: Where the outputs and the model of each task are saved.
    """
    pairs = {task: cached_pair(experiment, task, task) for task in folders}
    first = next((t for t in folders if experiment.kind_of(t) == OWN_HEAD), next(iter(folders)))
    run = started(experiment, seed, pairs[first], experiment.task_of(first), folders[first])
    runs = {
        task: replace(run, pair=pair, task=experiment.task_of(task), folder=folders[task])
        for task, pair in pairs.items()
    }
    specs = {first: TaskSpec()} | {
        task: TaskSpec(
            num_labels=pairs[task].labels,
            head=experiment.kind_of(task).replace("-", "_"),  # type: ignore[arg-type]  # a HeadName
            collator=each.task.collator(each.processor),
        )
        for task, each in runs.items()
        if task != first
    }
    adaptations = method.build(lambda: copy.deepcopy(run.model), specs)
    tasks = next(each for each in adaptations if isinstance(each, MultiTask))

    def train() -> Trainer:
        trainer = _trainer(run, method, runs)
        trainer.add_callback(AdaptationCallback(*adaptations))
        trainer.train()
        return trainer

    trainer, cost = measured(run, train)
    cost["seconds"] /= len(runs)
    results = []
    for task, each in runs.items():
        model = run.model if task == first else tasks.models[task].model
        results.append({**cost, **tested(each, tester(each, model), trainer.state.log_history)})
        if experiment.save_models or method.save:
            tasks.export(task, each.folder)
            results[-1]["model"] = str(each.folder)
    return results


def _trainer(run: Run, method: Method, runs: Mapping[str, Run]) -> Trainer:
    """The Trainer of all tasks."""
    dev = {
        task: each.rows(each.pair.source["dev"])
        for task, each in runs.items()
        if len(each.pair.source["dev"])
    }
    rows = {task: each.rows(each.pair.source["train"]) for task, each in runs.items()}
    trainer = Trainer(
        model=run.model,
        args=run.arguments(run.folder, **{**method.training, **({} if dev else NO_EVALUATION)}),
        train_dataset=_mixture(run.experiment, method, rows, run.seed),
        eval_dataset=dev or None,
        processing_class=run.processor,
        data_collator=run.task.collator(run.processor),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
