"""What runs a model before or beside its training leaves nothing behind."""

import copy
import random
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from hf_adapt.models.state import preserved


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


class Remembering(nn.Module):
    """Keeps what belongs together in attributes of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.recent: deque[int] = deque([1, 2], maxlen=2)
        self.counts = {"calls": 0}
        self.lengths, self.by_length = {0}, defaultdict(int)
        self.array, self.frozen = np.zeros(2), np.zeros(2)
        self.frozen.flags.writeable = False
        self.pair, self.longest, self.calls = (torch.zeros(1),), 0, 0
        self.generator = torch.Generator().manual_seed(0)
        self.output = CausalLMOutput(logits=torch.zeros(1))  # a dict that nobody may change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        self.recent.append(len(x))
        self.lengths.add(len(x))
        self.by_length[len(x)] += 1
        self.array += 1
        self.pair, self.longest = (torch.zeros(len(x)),), len(x)
        self.calls += 1
        self.counts["calls"] += 1
        self.output = CausalLMOutput(logits=x)
        if not hasattr(self, "started"):
            self.started, self.later = True, [0]
        self.later.append(1)
        assert len(self.seen) == self.calls == self.counts["calls"] == len(self.later) - 1
        assert self.pair[0].shape == (self.longest,)
        return x * torch.rand((), generator=self.generator)


def test_containers_belong_to_what_counts_them() -> None:
    model = Remembering()
    own = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    before = copy.deepcopy(own)
    drawn = model.generator.get_state()
    with preserved(model):
        model(torch.ones(3))
        model(torch.ones(2))
    now = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    assert now.keys() == own.keys()
    for name in ("seen", "recent", "counts", "lengths", "by_length", "array", "pair"):
        assert now[name] is own[name] and str(now[name]) == str(before[name])
    assert torch.equal(model.generator.get_state(), drawn)
    assert model.longest == model.calls == 0
    model(torch.ones(4))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        if not self.calls:
            self.layer = nn.Linear(x.shape[-1], 2)
        self.calls += 1
        return self.layer(x)


def test_a_module_that_builds_its_parts_keeps_them() -> None:
    """They may be trained already: to build them again would lose that."""
    model = Lazy()
    with preserved(model):
        model.eval()(torch.ones(1, 3))
    assert model.training
    layer = model.layer
    model(torch.ones(1, 3))
    assert model.layer is layer and model.calls == 2


def test_lazy_layers_are_built() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.BatchNorm1d(3))
    with preserved(model):
        model(torch.randn(4, 2))
        model.eval()
    assert model[1].training
    assert (model[0].in_features, model[1].num_features) == (2, 3)
    assert (int(model[1].num_batches_tracked), int(model[2].num_batches_tracked)) == (1, 0)
    model(torch.randn(4, 2))


def test_a_model_on_the_meta_device_has_no_values_to_keep() -> None:
    with torch.device("meta"):
        model = Counting()
    with preserved(model):
        pass
