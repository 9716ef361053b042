"""Interrupted and resumed is uninterrupted, in every phase; phases that wait for a plateau."""

from pathlib import Path
from typing import Any

import pytest

from hf_adapt import DANN, Adaptation, GradualUnfreezingCallback, adapt
from hf_adapt.unfreezing import FreezeOnly, GradualUnfreezing, Plateau, RandomLayers
from tests.helpers.data import rows
from tests.helpers.models import bert
from tests.helpers.trainers import (
    StopAt,
    same_bits,
    weights,
)
from tests.helpers.unfreezing import STEPS, make

SCHEDULES: dict[str, Any] = {
    "gradual": lambda: GradualUnfreezingCallback(layer_decay=0.5, rewarm_steps=3),
    "random": lambda: GradualUnfreezingCallback(
        RandomLayers(num_layers=1, every_steps=2, always=["head"])
    ),
    "plateau": lambda: GradualUnfreezingCallback(Plateau("eval_loss", patience=1, min_delta=0.5)),
}


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_resume_is_bit_exact_in_a_phase_and_on_its_boundary(
    kind: str, step: int, tmp_path: Path
) -> None:
    """Two steps a phase: 1, 3 and 5 lie inside one, 2 and 4 on a boundary."""
    settings: dict[str, Any] = dict(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2
    )
    whole = make(tmp_path / "whole", bert(dropout=True), **settings)
    whole.add_callback(SCHEDULES[kind]())
    whole.train()
    first = make(tmp_path / "part", bert(dropout=True), **settings)
    first.add_callback(SCHEDULES[kind]())
    first.add_callback(StopAt(step))
    first.train()
    second = make(tmp_path / "part", bert(dropout=True), **settings)
    second.add_callback(SCHEDULES[kind]())
    second.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{step}"))
    assert second.state.global_step == whole.state.global_step == STEPS
    assert same_bits(weights(whole.model), weights(second.model))
    states = [t.optimizer.state_dict()["state"] for t in (whole, second)]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert same_bits(states[0][key], states[1][key])
    logs = [
        [e["unfreezing/phase"] for e in t.state.log_history if "unfreezing/phase" in e]
        for t in (whole, second)
    ]
    assert logs[0] == logs[1] and len(set(logs[0])) > 1


def test_what_another_holds_fixed_stays_fixed_when_an_optimizer_is_loaded(tmp_path: Path) -> None:
    """As a sharded run resumes from a phase in which some groups, the head too, had not trained."""
    unfreezing = GradualUnfreezing(FreezeOnly("embeddings"))
    seen = []

    class Held(Adaptation):
        def setup(self, trainer: Any) -> None:
            self.fixed = [*trainer.model.classifier.parameters()]

        def begin(self, trainer: Any) -> None:
            with unfreezing.around_optimizer_load({"trained": ["layer.1"]}):
                seen.append(trainer.model.bert.embeddings.word_embeddings.weight.requires_grad)
            seen.extend(p.requires_grad for p in self.fixed)

    trainer = make(tmp_path, bert())
    adapt(trainer, unfreezing, Held())
    trainer.train()
    assert seen == [False, False, False]


def test_a_plateau_adds_a_group(tmp_path: Path) -> None:
    """With min_delta=9 nothing is an improvement but the first value: one group per evaluation."""
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1)
    callback = GradualUnfreezingCallback(Plateau("eval_loss", patience=2, min_delta=9.0))
    trainer.add_callback(callback)
    trainer.train()
    phases = [e["unfreezing/phase"] for e in trainer.state.log_history if "unfreezing/phase" in e]
    # The first evaluation is the best; the 2nd and 3rd are not better: phase 1 from step 3 on.
    assert phases == [0, 0, 0, 1, 1, 2, 2, 3]


def test_a_plateau_of_a_metric_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(GradualUnfreezingCallback(Plateau("eval_f1")))
    with pytest.raises(ValueError, match=r"waits for 'eval_f1', .* It gave: .*eval_loss"):
        trainer.train()


def test_a_plateau_of_one_of_several_evaluation_sets(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.eval_dataset = {"source": rows(6, 9), "target": rows(6, 8)}
    trainer.add_callback(GradualUnfreezingCallback(Plateau("eval_source_loss", min_delta=9.0)))
    trainer.train()
    phases = [e["unfreezing/phase"] for e in trainer.state.log_history if "unfreezing/phase" in e]
    assert phases == [0, 0, 1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "phase", "says"),
    [({}, 1, True), ({"every_steps": 2}, 2, False), ({"every_epochs": 0.25}, 2, False)],
)
def test_resuming_to_more_steps_says_what_is_frozen_again(
    options: dict[str, Any], phase: int, says: bool, tmp_path: Path, caplog: Any
) -> None:
    """Shares of the run are shares of the longer one; steps and epochs stay where they were."""
    short: dict[str, Any] = dict(max_steps=6, save_strategy="steps", save_steps=3)
    first = make(tmp_path, **short)
    first.add_callback(GradualUnfreezingCallback(until="layer.0", **options))
    first.train()
    for number, steps, warns in ((6, 24, says), (3, 6, False)):
        caplog.clear()
        longer = make(tmp_path / "more", max_steps=steps)
        longer.add_callback(GradualUnfreezingCallback(until="layer.0", **options))
        longer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{number}"))
        assert ("freezes layer.1, layer.0 again" in caplog.text) == warns
        assert ("every_steps=" in caplog.text and "step 6 of 24" in caplog.text) == warns
        if steps == 24:
            log = [entry for entry in longer.state.log_history if entry["step"] == 7]
            assert log[0]["unfreezing/phase"] == (0 if says else phase)


def test_a_plateau_is_remembered_when_another_adaptation_joins_at_resume(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(
        save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=1
    )
    phases = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        trainer = make(tmp_path, **settings)
        trainer.add_callback(GradualUnfreezingCallback(Plateau("eval_loss", min_delta=9.0)))
        if checkpoint:
            adapt(trainer, DANN(hidden_sizes=(4,)), target_dataset=rows(8, 2, None, low=20))
        trainer.train(resume_from_checkpoint=checkpoint)
        log = trainer.state.log_history
        phases.append([e["unfreezing/phase"] for e in log if "unfreezing/phase" in e])
    assert phases[0] == phases[1]


def test_a_plateau_needs_evaluations(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.add_callback(GradualUnfreezingCallback(Plateau()))
    with pytest.raises(ValueError, match="eval_strategy"):
        trainer.train()
