"""A forward beside the training that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_adapt.engine.auxiliary import preserved_random_state

PLAIN = (bool, int, float, str, type(None), torch.Tensor)
"""Attributes of a module that a forward may change: its mode, counters, lengths, cached tensors."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore a model's modes, buffers and counters afterwards, and the random state.

    A forward may change more than batch statistics, also in evaluation mode: count its calls, grow
    a table of positions and remember its length. What is put back is put back together, so that a
    buffer and the attribute that describes it go on belonging together.

    Args:
        model: Its parameters are left alone.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with preserved(model):
        ...     _ = model(torch.ones(3, 2))
        >>> int(model.num_batches_tracked)
        0
    """
    modules = list(model.modules())
    kept = [(module, _plain(vars(module)), dict(module._buffers)) for module in modules]
    tensors = [v for _, *both in kept for each in both for v in each.values() if _has_values(v)]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        with preserved_random_state():
            yield
    finally:
        with torch.no_grad():
            for tensor, before in values:
                if not torch.equal(tensor, before):
                    tensor.copy_(before)
        for module, attributes, buffers in kept:
            own = vars(module)
            for name in _plain(own).keys() - attributes.keys():
                del own[name]
            own.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, PLAIN)}


def _has_values(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not tensor.is_meta
