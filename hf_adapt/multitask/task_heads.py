"""The heads of all tasks on the body of a Trainer's model."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from transformers import Trainer

from hf_adapt.engine.streams import Routing
from hf_adapt.engine.trainer import AdaptationMixin
from hf_adapt.engine.trainer_kinds import is_sentence_trainer
from hf_adapt.engine.training import unwrapped_model
from hf_adapt.models.state import preserved_random_state
from hf_adapt.models.structure import unwrapped_base
from hf_adapt.multitask.export import save_task_model
from hf_adapt.multitask.label_checks import HeadOf, check_labels, rows_of_tasks
from hf_adapt.multitask.task_models import TEXT_HEADS, TaskModel, TaskSpec, kind_of, shares_head

logger = logging.getLogger(__name__)


class TaskHeads:
    """The models of several tasks that share the body of a Trainer's model.

    Args:
        trainer: The Trainer.
        tasks: The descriptions by the tasks' names, the Trainer's own first.
        seed: Seed of new heads.

    Attributes:
        model: The Trainer's model, unwrapped.
        models: The models of the tasks that have a head of their own.

    Raises:
        ValueError: If a head does not fit the model.
    """

    def __init__(self, trainer: Trainer, tasks: Mapping[str, TaskSpec], seed: int) -> None:
        if is_sentence_trainer(trainer):
            raise ValueError("MultiTask is for models with heads; a sentence encoder has none.")
        self.tasks = tasks
        self.model = unwrapped_model(trainer)
        self.base: Any = unwrapped_base(self.model)
        self.own_task, *others = tasks
        shared = [task for task in others if shares_head(self.base, tasks[task])]
        for task in shared:
            spec = tasks[task]
            if spec.loss is not None or spec.labels_column is not None or spec.collator is not None:
                raise ValueError(
                    f"The task {task!r} shares the head of the Trainer's model, and with it its "
                    "loss, its collator and the names of its label columns."
                )
        with preserved_random_state(seed):
            self.models = {
                task: TaskModel(self.model, task, tasks[task])
                for task in others
                if task not in shared
            }
        for task_model in self.models.values():
            _autocast(task_model.model, trainer)
        if self.models and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            what = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"The heads of {', '.join(self.models)} run on the body of the model, whose "
                f"weights {what} cuts into pieces. Use DDP."
            )

    @property
    def body(self) -> nn.Module:
        """What the tasks share: all but the heads, or the whole model where it is one."""
        found = getattr(self.base, "base_model", None)
        return found if isinstance(found, nn.Module) else cast(nn.Module, self.base)

    def head(self, task: str) -> HeadOf:
        """What the labels of a task must fit."""
        model = self.models[task].model if task in self.models else self.base
        kind = self.models[task].head if task in self.models else kind_of(self.base)
        config = getattr(model, "config", None)
        size = None if kind in (*TEXT_HEADS, None) else getattr(config, "num_labels", None)
        return HeadOf(kind, size, getattr(config, "problem_type", None))

    def routing(self, trainer: Trainer, column: str) -> Routing:
        """The rows of further tasks, and how they are collated.

        Raises:
            ValueError: If a task has no rows, or labels that its head cannot learn.
        """
        collators = {
            task: self.models[task].collator(trainer) if task in self.models else None
            for task in self.tasks
            if task != self.own_task
        }
        logger.info("%s", trainer.train_dataset)
        with preserved_random_state():
            rows = rows_of_tasks(trainer.train_dataset, column, list(self.tasks))
        for task, given in rows.items():
            collator, spec = collators.get(task), self.tasks[task]
            if collator is None:
                if not _has_own_loss(trainer):
                    check_labels(task, given, replace(self.head(task), reads_rows=False))
            elif spec.collator is None and spec.loss is None:
                check_labels(task, [collator.row(row) for row in given], self.head(task))
        return Routing(column, self.own_task, collators, rows[self.own_task][0])

    def view(self, trainer: Trainer, task: str) -> dict[str, Any]:
        """The Trainer's attributes while a task is evaluated."""
        spec, model = self.tasks[task], self.models.get(task)
        metrics: dict[str, Any] = {}
        if spec.metrics is not None:
            metrics = {"compute_metrics": spec.metrics}
        if model is None:
            return metrics
        collator = model.collator(trainer, needs_labels=False)
        if model.head != kind_of(self.base):
            metrics = {"compute_metrics": spec.metrics, "preprocess_logits_for_metrics": None}
        args = copy.copy(trainer.args)
        args.remove_unused_columns = False  # the task's collator chooses
        return {
            "model": model.model,
            "data_collator": collator,
            "label_names": model.labels,
            "compute_loss_func": None if spec.loss is None else _as_loss_func(spec.loss),
            "label_smoother": None,
            "args": args,
            **metrics,
        }

    def export(self, task: str, folder: str | os.PathLike[str]) -> None:
        """Write the plain model of a task."""
        save_task_model(self.model, self.models.get(task), folder)


def _autocast(model: nn.Module, trainer: Trainer) -> None:
    """Let a model run in the mixed precision of the run, as accelerate does with the Trainer's."""
    if not trainer.accelerator.native_amp:
        return
    forward = model.forward

    @functools.wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        with trainer.accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(mixed)


def _has_own_loss(trainer: Trainer) -> bool:
    """Whether the user computes the loss of the Trainer's own task, by whatever labels."""
    classes = [c for c in type(trainer).__mro__ if c is not AdaptationMixin]
    own = next(c for c in classes if "compute_loss" in vars(c))
    return trainer.compute_loss_func is not None or own is not Trainer


def _as_loss_func(loss: Any) -> Any:
    def compute(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return loss(outputs, labels)

    return compute
