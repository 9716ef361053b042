"""When an objective may compute its term together with the task's loss, without logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.normalisation import count_labels
from hf_adapt.engine.parts import Part
from hf_adapt.engine.selection import rows_of

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.adaptation import Objective
    from hf_adapt.engine.mixins import FusedLoss


def needs_logits(trainer: Trainer, others: Sequence[Objective], part: Part) -> str | None:
    """Why the logits of a whole batch are needed, or None.

    Args:
        trainer: The Trainer.
        others: The other objectives of the run.
        part: A first batch.
    """
    reading = [objective.name for objective in others if objective.uses_logits]
    if reading:
        return f"{', '.join(reading)} may need the logits"
    own = next(
        cls
        for cls in type(trainer).__mro__
        if "compute_loss" in cls.__dict__ and not cls.__module__.startswith("hf_adapt.")
    )
    if own.__name__ != "Trainer":
        return f"{own.__name__} has a compute_loss of its own"
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return "compute_loss_func or label smoothing needs the logits"
    if trainer.args.torch_compile:
        return "torch_compile would recompile the model for each micro-batch"
    if count_labels(trainer, part.inputs) is None:
        return "the batch has no labels"
    return None


def difference(fused: FusedLoss, base: torch.Tensor, term: torch.Tensor, rough: bool) -> str | None:
    """How a fused loss differs from the sums computed from logits, or None if it does not.

    Args:
        fused: Computed with factors 1.
        base: Sum of the task's loss.
        term: Sum of the objective's term.
        rough: Whether half precision is at work.
    """
    tolerance = 2e-2 if rough else 1e-4
    pairs = (
        (fused.base_sum, base),
        (fused.term_sum, term),
        (fused.loss, fused.base_sum + fused.term_sum),
    )
    agree = [
        torch.isclose(a.float(), b.float(), rtol=tolerance, atol=tolerance / 10) for a, b in pairs
    ]
    if all(agree):
        return None
    return (
        f"from hidden states the losses are {float(fused.base_sum):.5g} and "
        f"{float(fused.term_sum):.5g}, from logits {float(base):.5g} and {float(term):.5g}"
    )


def few_rows(part: Part) -> Part:
    """The first row with a label, and the first of each other domain."""
    size = len(part.domain)
    labels = part.inputs.get("labels")
    labelled = torch.ones(size, dtype=torch.bool, device=part.domain.device)
    if isinstance(labels, torch.Tensor) and len(labels) == size:
        labelled = labels.ne(IGNORED).reshape(size, -1).any(1)
    keep = torch.zeros(size, dtype=torch.bool, device=part.domain.device)
    for domain in set(part.domain.tolist()):
        rows = part.domain == domain
        chosen = (rows & labelled) if bool((rows & labelled).any()) else rows
        keep[int(chosen.int().argmax())] = True
    places = keep.nonzero().flatten().tolist()
    columns = {name: [values[i] for i in places] for name, values in part.columns.items()}
    extra = rows_of(part.extra, keep)
    return Part(rows_of(part.inputs, keep), part.domain[keep], columns=columns, extra=extra)


def with_labels(trainer: Trainer, part: Part) -> Part:
    """The part with labels to probe a loss with: as it is, or with the first class if it has none.

    Rows of other domains keep theirs hidden.
    """
    count = count_labels(trainer, part.inputs)
    if count is None or int(count) > 0:
        return part
    inputs = dict(part.inputs)
    for name in {*trainer.label_names, "labels", "shift_labels"} & set(inputs):
        labels, source = inputs[name], (part.domain == 0).nonzero().flatten()
        if isinstance(labels, torch.Tensor) and len(labels) == len(part.domain):
            inputs[name] = labels.index_fill(0, source.to(labels.device), 0)
    return dataclasses.replace(part, inputs=inputs)
