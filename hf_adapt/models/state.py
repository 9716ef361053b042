"""Contexts that restore random states and the state of a model."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
"""Containers that a forward may change in place; other types may not allow it."""

KEPT = (bool, int, float, str, type(None), torch.Tensor, tuple, frozenset, np.ndarray)
"""Types of attributes that a forward may change: modes, counters, lengths, cached tensors."""

INTERNAL = vars(nn.Module()).keys() - {"training"}
"""Attributes in which torch keeps parameters, buffers, submodules and hooks."""


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch afterwards.

    Args:
        seed: Seed of torch inside the context; None to leave its state as it is.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore a model's modes, buffers and counters afterwards, and the random state.

    A forward may change more than batch statistics, even in evaluation mode: count its calls, grow
    a table of positions and store its length, append to a list. All of this is restored together,
    so that a buffer and the attribute that describes it stay consistent. A module that builds its
    parameters or submodules in the forward keeps them, and everything else except its mode.

    Args:
        model: The model; its parameters are not restored.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with preserved(model):
        ...     _ = model(torch.ones(3, 2))
        >>> int(model.num_batches_tracked)
        0
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    states = [_ModuleState(module) for module in modules if not _is_unbuilt(module)]
    try:
        with preserved_random_state():
            yield
    finally:
        for state in states:
            state.restore()
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


class _ModuleState:
    """The state of a module, except its parameters and submodules."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.submodules, self.buffers = dict(module._modules), dict(module._buffers)
        self.attributes = _plain(module)
        values = [*self.attributes.values(), *self.buffers.values()]
        self.tensors = [(v, v.detach().clone()) for v in values if _has_values(v)]
        self.arrays = [(v, v.copy()) for v in values if _is_writeable(v)]
        self.containers = [(v, copy.copy(v)) for v in values if type(v) in CONTAINERS]
        own = vars(module).values()
        self.generators = [(v, v.get_state()) for v in own if isinstance(v, torch.Generator)]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything in the same objects, unless the module has built submodules."""
        if self.module._modules != self.submodules:
            return
        for tensor, before in self.tensors:
            if not torch.equal(tensor, before):
                tensor.copy_(before)
        for array, content in self.arrays:
            array[...] = content
        for container, content in self.containers:
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(content)
        for generator, state in self.generators:
            generator.set_state(state)
        own = vars(self.module)
        for name in _plain(self.module).keys() - self.attributes.keys():
            del own[name]
        own.update(self.attributes)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in INTERNAL and (isinstance(value, KEPT) or type(value) in CONTAINERS)
    }


def _is_unbuilt(module: nn.Module) -> bool:
    """Whether the first forward determines its sizes, as in torch's lazy layers."""
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and is_lazy(tensor) for tensor in own)


def _has_values(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not tensor.is_meta


def _is_writeable(array: Any) -> bool:
    """Whether a forward can change it; memory-mapped files, which may be large, are not copied."""
    is_array = isinstance(array, np.ndarray) and not isinstance(array, np.memmap)
    return is_array and bool(array.flags.writeable)
