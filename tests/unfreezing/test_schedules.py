import pytest

from hf_adapt.unfreezing import (
    LPFT,
    FreezeOnly,
    Gradual,
    LayerGroup,
    Phase,
    Plateau,
    RandomLayers,
    Surgical,
)
from hf_adapt.unfreezing.phases import Clock
from hf_adapt.unfreezing.schedules import select

GROUPS = [
    LayerGroup("embeddings", ("e",), "embeddings", "", 0),
    LayerGroup("layer.0", ("l0",), "layer", "", 1),
    LayerGroup("layer.1", ("l1",), "layer", "", 2),
    LayerGroup("layer.2", ("l2",), "layer", "", 3),
    LayerGroup("norm", ("n",), "norm", "", 3),
    LayerGroup("head", ("h",), "head", "", 4),
]
ALL = [group.name for group in GROUPS]


def trained(phases):
    return [sorted(phase.train) for phase in phases]


def test_the_head_first_then_one_level_a_phase_with_the_norm_beside_the_top_layer():
    phases = Gradual().phases(GROUPS)
    assert trained(phases) == [
        ["head"],
        sorted(["head", "layer.2", "norm"]),
        sorted(["head", "layer.2", "norm", "layer.1"]),
        sorted(["head", "layer.2", "norm", "layer.1", "layer.0"]),
        sorted(ALL),
    ]
    assert [str(phase.at) for phase in phases] == ["0", "20%", "40%", "60%", "80%"]


def test_bottom_up_is_the_reverse():
    assert trained(Gradual(direction="bottom_up").phases(GROUPS))[:2] == [
        ["embeddings"],
        ["embeddings", "layer.0"],
    ]


def test_any_order_with_several_groups_in_a_phase():
    schedule = Gradual(every_steps=7, direction=["layer.1", ["head", r"layer\.[02]"]])
    phases = schedule.phases(GROUPS)
    assert trained(phases) == [["layer.1"], ["head", "layer.0", "layer.1", "layer.2"]]
    assert [phase.at.amount for phase in phases] == [0, 7]


def test_every_epochs():
    phases = Gradual(every_epochs=0.5).phases(GROUPS)
    assert [Clock(100, 20.0).step_of(phase.at) for phase in phases] == [0, 10, 20, 30, 40]


def test_until_leaves_the_rest_frozen():
    phases = Gradual(until="layer.1").phases(GROUPS)
    assert trained(phases)[-1] == sorted(["head", "layer.2", "norm", "layer.1"])


def test_lp_ft_is_the_head_and_then_everything():
    phases = LPFT("1 epoch").phases(GROUPS)
    assert trained(phases) == [["head"], sorted(ALL)]
    assert str(phases[1].at) == "1 epoch"


def test_surgical_trains_one_block_and_nothing_else():
    assert trained(Surgical("layer.1").phases(GROUPS)) == [["layer.1"]]


def test_freeze_only_is_the_complement():
    assert trained(FreezeOnly("embeddings", r"layer\.[01]").phases(GROUPS)) == [
        ["head", "layer.2", "norm"]
    ]


def test_random_layers_are_a_pure_function_of_the_seed():
    clock = Clock(95)
    phases = RandomLayers(num_layers=2, every_steps=10).phases(GROUPS, clock, seed=3)
    assert [phase.at.amount for phase in phases] == list(range(0, 95, 10))
    for phase in phases:
        assert {"embeddings", "norm", "head"} < set(phase.train)
        assert sum(name.startswith("layer") for name in phase.train) == 2
    assert len({phase.train for phase in phases}) == 3  # each pair of three layers turns up
    again = RandomLayers(num_layers=2, every_steps=10).phases(GROUPS, clock, seed=3)
    other = RandomLayers(num_layers=2, every_steps=10).phases(GROUPS, clock, seed=4)
    assert phases == again != other
    fixed = RandomLayers(num_layers=2, every_steps=10, seed=3).phases(GROUPS, clock, seed=9)
    assert fixed == phases


def test_random_layers_besides_chosen_groups():
    schedule = RandomLayers(num_layers=1, every_steps=5, always=["head", "layer.2"])
    for phase in schedule.phases(GROUPS, Clock(50)):
        assert set(phase.train) in ({"head", "layer.2", "layer.0"}, {"head", "layer.2", "layer.1"})


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (Plateau("eval_loss"), [1.0, 0.9, 0.9, 0.95], [True, True, False, False]),
        (Plateau("eval_accuracy"), [0.5, 0.6, 0.6], [True, True, False]),
        (Plateau("eval_accuracy", greater_is_better=False), [0.5, 0.6], [True, False]),
        (Plateau("eval_loss"), [float("nan"), 1.0, float("nan"), 0.9], [False, True, False, True]),
        (Plateau("eval_loss", min_delta=0.2), [1.0, 0.9, 0.7], [True, False, True]),
    ],
)
def test_what_counts_as_better(rule, values, expected):
    best, found = None, []
    for value in values:
        found.append(rule.improved(value, best))
        if found[-1]:
            best = value
    assert found == expected


def test_a_plateau_schedule_waits_in_every_phase_but_the_first():
    phases = Plateau().phases(GROUPS)
    assert [phase.at.unit for phase in phases] == ["step"] + ["plateau"] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gradual(every_steps=5, every_epochs=1), "not both"),
        (lambda: Gradual(every_steps=0), "every_steps=0 must be positive"),
        (lambda: Gradual(every_steps=2.5), "whole number"),
        (lambda: Gradual(every_epochs=-1.0), "every_epochs=-1.0 must be positive"),
        (lambda: Gradual(direction="sideways").phases(GROUPS), "direction='sideways' is unknown"),
        (lambda: Gradual(direction=["head", "h.*"]).phases(GROUPS), "names head twice"),
        (lambda: Gradual(direction=["head"], until="norm").phases(GROUPS), "not in the order"),
        (lambda: Gradual(until="layr.1").phases(GROUPS), r"no layer group 'layr.1'. Did you mean"),
        (lambda: Surgical("layer.7").phases(GROUPS), r"no layer group 'layer.7'"),
        (lambda: select("(", GROUPS), "is not a regular expression"),
        (lambda: RandomLayers().phases(GROUPS), "number of steps must be known"),
        (lambda: RandomLayers(num_layers=4).phases(GROUPS, Clock(9)), "can draw from 3 layers"),
        (lambda: RandomLayers(num_layers=0), "at least 1"),
        (lambda: Plateau(patience=0), "patience >= 1"),
        (lambda: Phase("soon", "head"), "'soon' is not a moment"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
