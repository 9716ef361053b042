"""How a micro-batch's loss must be scaled so that accumulation and processes change nothing.

Two facts about the Trainer decide it. It divides a loss by the number of accumulated micro-batches
unless it holds the loss to be scaled already; and it holds every model whose forward takes
`**kwargs` to have divided by `num_items_in_batch`, which sequence- and token-classification heads,
among others, do not do (transformers issue 47688).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hf_adapt.engine.labels import IGNORED
from hf_adapt.models.structure import is_encoder_decoder, unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer


def trainer_divides(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Whether `training_step` will divide the loss by the number of micro-batches."""
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)
    if declared is not None:
        return not declared
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return not counted and trainer.compute_loss_func is None


def data_parallel_size(trainer: Trainer) -> int:
    """Number of processes that see batches of their own (the gradients are averaged over them)."""
    tensor_parallel = getattr(trainer, "get_tp_size", lambda: 1)()
    return int(trainer.accelerator.num_processes // max(1, tensor_parallel))


def count_labels(trainer: Trainer, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Number of labels of a micro-batch that its loss averages over, or None if unknown.

    A causal language model never predicts its first token.
    """
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, torch.Tensor) or labels.ndim == 0:
        return None
    model = unwrapped_base(trainer.accelerator.unwrap_model(trainer.model))
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    if (
        shifts
        and not is_encoder_decoder(model)
        and "shift_labels" not in inputs
        and labels.ndim > 1
    ):
        labels = labels[..., 1:]
    return labels.ne(IGNORED).sum()


def rows_of(inputs: Mapping[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    """The chosen rows of a batch: every tensor or list with one entry per row is indexed."""
    size, places = len(keep), keep.nonzero().flatten().tolist()

    def chosen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == size:
            return value[keep.to(value.device)]
        if isinstance(value, list) and len(value) == size:
            return [value[place] for place in places]
        return value

    return {key: chosen(value) for key, value in inputs.items()}


def as_if_alone(inputs: Mapping[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    """The chosen rows of a batch, padded as they would be without the others.

    A batch that is wider than its longest row was padded to a width of its own, which is kept.
    """
    rows, mask = rows_of(inputs, keep), inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not bool(mask.any(0).all()):
        return rows
    used = rows["attention_mask"].bool().any(0)
    wide = (len(rows["attention_mask"]), len(used))
    return {
        key: value[:, used]
        if isinstance(value, torch.Tensor) and value.shape[:2] == wide
        else value
        for key, value in rows.items()
    }
