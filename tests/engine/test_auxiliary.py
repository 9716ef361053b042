"""The random state that building leaves alone, seeds by name, and the run's base schedule."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, get_scheduler

from hf_adapt.engine.auxiliary import base_schedule, seed_for
from hf_adapt.models.state import preserved_random_state
from tests.helpers.models import bert
from tests.helpers.trainers import arguments

# ---- preserved_random_state ----


def draw():
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def seed_all(seed=0):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("seed", [None, 5])
def test_random_states_are_given_back(seed):
    seed_all()
    expected = [draw(), draw()]
    seed_all()
    first = draw()
    with preserved_random_state(seed):
        draw()
        seed_all(99)
    assert [first, draw()] == expected


def test_random_states_are_given_back_after_an_error():
    seed_all()
    expected = draw()
    seed_all()
    with pytest.raises(KeyError), preserved_random_state(1):
        draw()
        raise KeyError
    assert draw() == expected


def test_seed_makes_what_is_built_inside_the_same():
    def build(before, seed):
        seed_all(before)
        with preserved_random_state(seed):
            return nn.Linear(3, 3).weight

    assert torch.equal(build(0, 7), build(1, 7))
    assert not torch.equal(build(0, 7), build(0, 8))


def test_without_a_seed_the_stream_goes_on_inside():
    seed_all()
    expected = draw()
    seed_all()
    with preserved_random_state():
        assert draw() == expected


# ---- seed_for ----


def test_seed_depends_on_the_run_and_the_name_alone():
    """A constant, sha256("42/dann"): `hash()` would differ between processes."""
    assert seed_for("dann", 42) == 46072925
    seeds = {seed_for(name, seed) for name in ("dann", "mmd", "1/dann") for seed in (0, 1, 42)}
    assert len(seeds) == 9 and all(0 <= seed < 2**32 for seed in seeds)


# ---- base_schedule ----

RATE, STEPS, WARMUP = 5e-5, 10, 3
SCHEDULES = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "polynomial": {"lr_end": RATE / 4},
    "cosine_with_min_lr": {"min_lr": RATE / 2},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


def schedule_of(folder, kind, options):
    args = arguments(
        folder,
        learning_rate=RATE,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        warmup_steps=WARMUP,
    )
    trainer = Trainer(bert(), args)
    trainer.create_optimizer_and_scheduler(STEPS)
    return base_schedule(trainer)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_base_schedule_is_the_main_optimizers_factor(tmp_path, kind):
    """Read off an optimizer with the run's own rate, step by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=RATE)
    scheduler = get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=WARMUP,
        num_training_steps=STEPS,
        scheduler_specific_kwargs=SCHEDULES[kind],
    )
    factor = schedule_of(tmp_path, kind, SCHEDULES[kind])
    for step in range(STEPS):
        expected = optimizer.param_groups[0]["lr"] / RATE
        assert factor(step) == pytest.approx(expected, rel=1e-6, abs=1e-12), f"step {step}"
        optimizer.step()
        scheduler.step()


def test_base_schedule_is_a_pure_function_of_the_step(tmp_path):
    factor = schedule_of(tmp_path, "linear", {})
    assert [factor(step) for step in (9, 0, 3, 3)] == pytest.approx([1 / 7, 0, 1, 1])


def test_base_schedule_ignores_a_groups_own_factor(tmp_path):
    """A frozen first group has rate 0; the auxiliary modules learn all the same."""
    trainer = Trainer(bert(), arguments(tmp_path, lr_scheduler_type="constant"))
    trainer.create_optimizer_and_scheduler(STEPS)
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    assert base_schedule(trainer)(5) == 1.0


def test_authors_own_schedule_is_read_off_the_optimizer(tmp_path):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    trainer = Trainer(
        model, arguments(tmp_path, learning_rate=9.0), optimizers=(optimizer, scheduler)
    )
    factor = base_schedule(trainer)
    assert factor(0) == 1.0
    optimizer.step()
    scheduler.step()
    assert factor(1) == 0.5


def test_schedule_that_reacts_to_a_metric_is_read_off_the_optimizer(tmp_path):
    args = arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    group = {"lr": args.learning_rate / 4, "initial_lr": args.learning_rate}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau.__new__(
        torch.optim.lr_scheduler.ReduceLROnPlateau
    )
    trainer = SimpleNamespace(
        args=args, optimizer=SimpleNamespace(param_groups=[group]), lr_scheduler=scheduler
    )
    assert base_schedule(trainer)(5) == pytest.approx(0.25)


def test_a_rate_of_0_gives_a_factor_of_0(tmp_path):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    trainer = SimpleNamespace(
        args=arguments(tmp_path, learning_rate=0.0), optimizer=optimizer, lr_scheduler=None
    )
    assert base_schedule(trainer)(0) == 0.0
