"""What runs a model before or beside its training leaves nothing behind."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_adapt.engine.preserving import preserved


class Counting(nn.Module):
    """Counts its forwards in every way that a module can, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2), persistent=False)
        self.layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.cache = torch.zeros(3)
        self.calls = 0
        self.longest: int | None = None

    def forward(self, x: torch.Tensor) -> Any:
        self.in_place += 1
        self.replaced = self.replaced + len(x)
        self.cache[0] += 1
        self.calls += 1
        self.longest = max(self.longest or 0, len(x))
        self.later = self.calls
        self.register_buffer("made_later", torch.ones(self.calls), persistent=False)
        return self.layer(x) * torch.rand(())


def everything(model: nn.Module) -> list[Any]:
    plain = [
        {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, torch.Tensor))}
        for m in model.modules()
    ]
    found = [sorted(each.items()) for each in plain]
    buffers = sorted((name, value.tolist()) for name, value in model.named_buffers())
    drawn = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    return [str(found), buffers, drawn]


@contextmanager
def interrupted() -> Iterator[None]:
    with pytest.raises(KeyboardInterrupt):
        yield


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_as_it_was(fails: bool) -> None:
    model = Counting().train()
    model.layer[1].eval()  # as a frozen batch norm is
    buffer, before = model.replaced, everything(model)
    own = model.in_place
    with interrupted() if fails else preserved(model):
        with preserved(model):
            model.eval()
            model(torch.randn(5, 2))
            model.train()
            model(torch.randn(7, 2))
            random.random(), np.random.rand()  # what an author's forward may draw
            if fails:
                raise KeyboardInterrupt
    assert everything(model) == before
    assert model.replaced is buffer and model.in_place is own
    assert not hasattr(model, "made_later") and not hasattr(model, "later")
    assert model.training and not model.layer[1].training
    model(torch.randn(3, 2))
    assert model.in_place == 1 and model.longest == 3


def test_a_model_on_the_meta_device_has_no_values_to_keep() -> None:
    with torch.device("meta"):
        model = Counting()
    with preserved(model):
        pass
