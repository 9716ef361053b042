import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from hf_adapt.engine.progress import slanted_triangular
from hf_adapt.engine.rates import DividedGroups
from hf_adapt.unfreezing import layer_groups
from hf_adapt.unfreezing.lr_multipliers import (
    depths,
    group_importance,
    group_multipliers,
    importance_multiplier,
    rewarm_multiplier,
)
from tests.helpers.models import bert


def test_decay_is_counted_from_the_head():
    """ULMFiT: the head has the full rate, each level below 1 / 2.6 of the one above."""
    groups = layer_groups(bert(num_hidden_layers=3))
    rates = group_multipliers(groups, layer_decay=1 / 2.6)
    assert rates == pytest.approx(
        {"layer.2": 2.6**-1, "layer.1": 2.6**-2, "layer.0": 2.6**-3, "embeddings": 2.6**-4}
    )


def test_without_a_head_the_top_layer_has_the_full_rate():
    groups = layer_groups(bert(num_hidden_layers=2).bert)
    assert depths(groups) == {"embeddings": 2, "layer.0": 1, "layer.1": 0}


def test_each_tower_decays_from_its_own_top():
    config = T5Config(
        d_model=8, d_kv=4, d_ff=8, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=16
    )
    found = depths(layer_groups(T5ForConditionalGeneration(config)))
    assert found["encoder.layer.2"] == found["decoder.layer.1"]
    assert found["encoder.layer.0"] == found["encoder.layer.2"] + 2
    assert found["embeddings"] == max(found.values())
    assert list(found.values()).count(max(found.values())) == 1


def test_rates_by_name_take_the_place_of_the_decayed_ones():
    groups = layer_groups(bert(num_hidden_layers=3))
    rates = group_multipliers(groups, 0.5, {r"layer\..*": 0.1, "layer.1": 3.0})
    assert rates == {"embeddings": 0.0625, "layer.0": 0.1, "layer.1": 3.0, "layer.2": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay=0.0: expected"),
        ({"layer_decay": 1.1}, "layer_decay=1.1: expected"),
        ({"lr_multipliers": {"head": -1.0}}, r"lr_multipliers\['head'\]=-1.0"),
        ({"lr_multipliers": {"haed": 1.0}}, "Did you mean 'head'"),
    ],
)
def test_bad_rates_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        group_multipliers(layer_groups(bert()), **options)


def test_importance_takes_from_the_rate():
    groups = layer_groups(bert())
    assert group_importance(groups, {r"layer\..*": 0.25}) == {"layer.0": 0.25, "layer.1": 0.25}
    assert importance_multiplier(0.25, 0.0) == 0.75
    assert importance_multiplier(lambda progress: 1 - progress, 0.5) == 0.5
    assert importance_multiplier(lambda progress: 3.0, 0.5) == 0.0
    with pytest.raises(ValueError, match=r"expected 0 .* to 1"):
        group_importance(groups, {"head": 1.5})


def test_a_newly_unfrozen_group_warms_up():
    assert [rewarm_multiplier(s, 10, 5) for s in (10, 11, 14, 15, 99)] == [0.2, 0.4, 1.0, 1.0, 1.0]
    assert rewarm_multiplier(0, 0, 5) == 1.0, "what trains from the start has the run's own warm-up"


@pytest.mark.parametrize("total", [40, 200])
def test_the_slanted_triangle_is_the_published_formula(total):
    """Howard & Ruder 2018, Eq. 3, for a cut that falls on a step."""
    cut_fraction, ratio = 0.1, 32
    rate = slanted_triangular(cut_fraction, ratio)
    cut = total * cut_fraction
    for t in range(total + 1):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_fraction - 1))
        assert rate(t / total) == pytest.approx((1 + p * (ratio - 1)) / ratio)


@pytest.mark.parametrize("options", [(0.0,), (1.0,), (0.1, 0.5)])
def test_a_triangle_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="slanted_triangular needs"):
        slanted_triangular(*options)


# ---- the optimizer's groups, divided for a step ----


def parameters(number):
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(number)]


def test_groups_are_divided_for_a_step_and_put_back():
    a, b, c = parameters(3)
    optimizer = torch.optim.SGD([{"params": [a, b], "lr": 1.0}, {"params": [c], "lr": 0.1}])
    before = optimizer.param_groups
    divided = DividedGroups()
    divided.apply(optimizer, [{a: 0.5}, {a: 0.5, c: 0.0}])
    assert [(g["lr"], [id(p) for p in g["params"]]) for g in optimizer.param_groups] == [
        (0.25, [id(a)]),
        (1.0, [id(b)]),
    ]
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    divided.restore()
    assert [p[0].item() for p in (a, b, c)] == [0.75, 0.0, 1.0]
    assert optimizer.param_groups is before
    assert [g["lr"] for g in before] == [1.0, 0.1]
    assert optimizer.state_dict()["param_groups"][0]["params"] == [0, 1]


def test_nothing_to_divide_leaves_the_groups_alone():
    (a,) = parameters(1)
    optimizer = torch.optim.SGD([a], lr=1.0)
    before = optimizer.param_groups
    divided = DividedGroups()
    divided.apply(optimizer, [{}, {}])
    assert optimizer.param_groups is before
    divided.restore()
    divided.restore()
    assert optimizer.param_groups is before


class CountingSGD(torch.optim.SGD):
    """Counts its steps per group, as schedule-free optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


def test_what_an_optimizer_counts_per_group_is_kept():
    a, b, c = parameters(3)
    optimizer = CountingSGD([a, b, c], lr=1.0)
    divided = DividedGroups()
    for _ in range(3):
        divided.apply(optimizer, [{a: 0.5, c: 0.0}])
        optimizer.step()
        divided.restore()
    assert optimizer.param_groups[0]["count"] == 3
    assert optimizer.param_groups[0]["lr"] == 1.0
