"""Target rows without a label in a training loss: whether it ignores them, and why it fails."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.parts import Part
from hf_adapt.engine.selection import rows_of

TARGET_ROWS_FAIL = (
    "hf_adapt: this was raised for rows of the target_dataset. Were they tokenised with the "
    "model's own tokenizer, and truncated to its length, as the train_dataset was?"
)


def explained(
    error: Exception,
    part: Part,
    label_names: Collection[str],
    loss: Callable[[Mapping[str, Any]], Any],
) -> Exception:
    """What to raise where a training loss failed: the error, or one that says what to do.

    Args:
        error: What it raised.
        part: The rows.
        label_names: Inputs that are labels.
        loss: The loss of other inputs.
    """

    def works(inputs: Mapping[str, Any]) -> bool:
        try:
            loss(inputs)
        except Exception:
            return False
        return True

    source = part.domain == 0
    if bool(source.all()) or should_reduce_batch_size(error):
        return error
    if not works(rows_of(part.inputs, source)):
        return error  # source rows fail too
    if not works(with_source_labels(part.inputs, part.domain, label_names)):
        error.add_note(TARGET_ROWS_FAIL)
        return error
    return ValueError(
        f"The training loss failed on unlabelled target rows, whose label is {IGNORED} "
        f"({type(error).__name__}: {error}); on the source rows alone it works. Pass "
        "target_dataset=Stream(dataset, forward='separate'), which computes the loss on source "
        f"rows alone, or leave out rows labelled {IGNORED} in your own loss."
    )


def with_source_labels(
    inputs: Mapping[str, Any], domain: torch.Tensor, names: Collection[str]
) -> dict[str, Any]:
    """The batch with a source row's label in place of each hidden one."""
    labelled = dict(inputs)
    for name in set(names) & inputs.keys():
        labels = inputs[name]
        if not isinstance(labels, torch.Tensor) or len(labels) != len(domain):
            continue
        known = labels[(domain == 0).to(labels.device)]
        known = known[known != IGNORED].flatten()
        if len(known):
            target = (domain > 0).to(labels.device).view(-1, *[1] * (labels.ndim - 1))
            labelled[name] = torch.where(target & labels.eq(IGNORED), known[0], labels)
    return labelled


def depends_on_target(loss: torch.Tensor, outputs: Any, domain: torch.Tensor) -> bool | None:
    """Whether a loss has a gradient at the predictions for target rows.

    Its value does not tell: it may be that of the source rows by chance, or because the head is
    all zeros.

    Args:
        loss: The loss, with its graph.
        outputs: The model's outputs of the same forward.
        domain: (B,) long, 0 for source rows.

    Returns:
        None where the outputs have no predictions that the loss was computed from.
    """
    target = domain > 0
    predictions = [
        value
        for name, value in (outputs.items() if isinstance(outputs, Mapping) else ())
        if name.endswith(("logits", "scores"))
        and isinstance(value, torch.Tensor)
        and value.requires_grad
        and len(value) == len(domain)
    ]
    if not predictions or not loss.requires_grad or not bool(target.any()):
        return None
    gradients: list[torch.Tensor | None] = list(
        torch.autograd.grad(loss, predictions, allow_unused=True)
    )
    found = [g for g in gradients if g is not None and bool(torch.isfinite(g).all())]
    if not found:
        return None
    # Two forwards that are drawn together (R-Drop) are equal here but for rounding.
    return any(float(g[target].abs().max()) > 1e-5 * float(g.abs().max()) for g in found)


def trains_on_target(model: nn.Module, label_names: Collection[str]) -> str:
    """What to say of a loss that does not ignore target rows."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    return (
        f"The loss of {type(model).__name__} (problem_type={problem!r}) does not ignore unlabelled "
        "target rows: their predictions change it. Regression, multi-label and question-answering "
        f"losses take {IGNORED} for a value; labels under another name than "
        f"{', '.join(sorted(label_names))} are not hidden unless "
        "TrainingArguments(label_names=[...]) names them. Pass target_dataset=Stream(dataset, "
        f"forward='separate'), which computes the loss on source rows alone, or mask {IGNORED} in "
        "your own compute_loss."
    )
