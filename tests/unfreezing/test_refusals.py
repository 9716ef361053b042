"""What cannot work is refused, before training where that is possible."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_adapt import GradualUnfreezingCallback, adapt
from hf_adapt.unfreezing import LPFT, GradualUnfreezing, Phase, Surgical
from tests.helpers.models import bert
from tests.helpers.unfreezing import Watch, make


def test_a_parameter_missing_from_the_optimizer_is_named(tmp_path: Path) -> None:
    """Frozen when the optimizer was made: the classic silent failure."""
    model = bert()
    model.bert.requires_grad_(False)
    trainer = make(tmp_path, model)
    trainer.create_optimizer()
    model.bert.requires_grad_(True)
    trainer.add_callback(GradualUnfreezingCallback())
    with pytest.raises(ValueError, match=r"trains bert\.embeddings.* and \d+ more, but the opt"):
        trainer.train()


@pytest.mark.parametrize(
    ("make_callback", "message"),
    [
        (lambda: GradualUnfreezingCallback(every_steps=3), r"beyond the last of the run's 8"),
        (lambda: GradualUnfreezingCallback(every_epochs=2), r"beyond the last of the run's 8"),
        (lambda: GradualUnfreezingCallback([Phase(8, "head")]), "first phase starts at 8"),
        (lambda: GradualUnfreezingCallback([Phase(0, "hed")]), "Did you mean 'head'"),
        (lambda: GradualUnfreezingCallback([Phase(0, [])]), "trains no group"),
        (
            lambda: GradualUnfreezingCallback([Phase(0, "head"), Phase(5, ".*"), Phase(2, "head")]),
            "in the order in which they start",
        ),
        (lambda: GradualUnfreezingCallback([Phase(0, "head"), Phase("plateau", ".*")]), "no `plat"),
        (
            lambda: GradualUnfreezingCallback(
                [Phase(0, "head"), Phase("plateau", ".*"), Phase(5, "head")]
            ),
            "comes after one that waits for a plateau",
        ),
        (lambda: GradualUnfreezingCallback(groups={"a": ".*", "b": "bert"}), "'a' and 'b' both"),
        (lambda: GradualUnfreezingCallback(groups={"a": "bert"}), r"in no group: 'classifier"),
        (lambda: GradualUnfreezingCallback(groups={"a": "bret"}), "matches no"),
        (
            lambda: GradualUnfreezingCallback(Surgical("layer.0"), lr_multipliers={"layer.0": 0.0}),
            "nothing would learn",
        ),
    ],
)
def test_bad_input_is_refused_before_training(
    make_callback: Any, message: str, tmp_path: Path
) -> None:
    watch = Watch()
    trainer = make(tmp_path, callbacks=[watch])
    trainer.add_callback(make_callback())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not watch.moved
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_two_schedules_of_what_is_frozen_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.add_callback(GradualUnfreezingCallback())
    adapt(trainer, GradualUnfreezing(LPFT(), name="other"))
    with pytest.raises(ValueError, match="both decide what is frozen"):
        trainer.train()


def test_rates_that_an_optimizer_would_ignore_are_refused(tmp_path: Path) -> None:
    from transformers.optimization import Adafactor, AdafactorSchedule

    def build(**options: Any) -> Trainer:
        trainer = make(tmp_path)
        trainer.optimizer = Adafactor(trainer.model.parameters())  # relative_step=True
        trainer.lr_scheduler = AdafactorSchedule(trainer.optimizer)
        trainer.add_callback(GradualUnfreezingCallback(**options))
        return trainer

    build().train()  # freezing alone is fine
    with pytest.raises(ValueError, match="makes its own learning rates"):
        build(layer_decay=0.5).train()


@pytest.mark.parametrize(
    ("make_callback", "error", "message"),
    [
        (lambda: GradualUnfreezingCallback([]), ValueError, "schedule is empty"),
        (lambda: GradualUnfreezingCallback([3]), TypeError, r"list of Phase\(at, train\); got int"),
        (lambda: GradualUnfreezingCallback(5), TypeError, r"list of Phase\(at, train\); got int"),
        (lambda: GradualUnfreezingCallback(every_step=5), TypeError, "no option every_step"),
        (
            lambda: GradualUnfreezingCallback(LPFT(), every_steps=5),
            ValueError,
            "every_steps belong to the default schedule",
        ),
        (lambda: GradualUnfreezingCallback(rewarm_steps=-1), ValueError, "must be 0 or more"),
        (
            lambda: GradualUnfreezingCallback(cache_frozen_prefix=True, frozen_dropout=True),
            ValueError,
            "Drop frozen_dropout=True",
        ),
        (lambda: GradualUnfreezingCallback("nowhere.yaml"), FileNotFoundError, "nowhere.yaml"),
    ],
)
def test_contradictions_are_refused_at_once(
    make_callback: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_callback()
