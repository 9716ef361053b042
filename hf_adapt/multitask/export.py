"""A task's model as a plain Hugging Face model."""

from __future__ import annotations

import copy
import os
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_adapt.models.structure import unwrapped_base
from hf_adapt.multitask.task_models import TaskModel


def save_task_model(
    model: nn.Module, head: TaskModel | None, folder: str | os.PathLike[str]
) -> None:
    """Write a model with the head of a task; adapters are merged into a copy of its weights.

    Args:
        model: The Trainer's model, unwrapped.
        head: The model of the task; None for the Trainer's own.
        folder: Made if it is missing.

    Raises:
        ValueError: If weights of the plain model are missing.
    """
    base = unwrapped_base(model)
    if base is not model:  # a PEFT model
        base = cast(Any, copy.deepcopy(model)).merge_and_unload()
    base = cast(PreTrainedModel, base)
    if head is None:
        base.save_pretrained(str(folder))
        return
    task = head.model
    prefix = f"{task.base_model_prefix}."
    body = base.base_model.state_dict()
    dtype = next(base.base_model.parameters()).dtype
    state = {prefix + name: value for name, value in body.items()}
    for name, value in task.state_dict().items():
        if not name.startswith(prefix):
            state[name] = value.to(dtype) if value.is_floating_point() else value
    with torch.device("meta"):
        plain = type(task)(task.config)
    wanted = plain.state_dict().keys()
    if missing := sorted(wanted - state.keys()):
        raise ValueError(
            f"{type(task).__name__} has weights that the training had not: {', '.join(missing[:5])}"
        )
    # A body may have more than this head needs (a pooler).
    kept = {name: value for name, value in state.items() if name in wanted}
    plain.save_pretrained(str(folder), state_dict=kept)
