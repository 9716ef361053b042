"""What a run leaves behind: nothing but the trained weights and a plain checkpoint."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.unfreezing import LPFT
from tests.helpers.models import FIVE, bert
from tests.helpers.unfreezing import STEPS, Watch, make


def test_a_run_leaves_no_trace(tmp_path: Path) -> None:
    trainer = make(tmp_path, gradient_checkpointing=True)
    trainer.add_callback(GradualUnfreezingCallback(until="layer.1"))
    trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert len(trainer.optimizer.param_groups) == 2
    assert trainer.args.ddp_find_unused_parameters is None
    assert trainer._adaptation_run is None


def test_a_failed_run_leaves_no_trace(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise RuntimeError("interrupted")

    trainer = make(tmp_path)
    trainer.add_callback(GradualUnfreezingCallback(LPFT()))
    trainer.add_callback(Fail())
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert len(trainer.optimizer.param_groups) == 2


def test_the_author_s_own_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    watch = Watch()
    trainer = make(tmp_path, model, callbacks=[watch], weight_decay=0.1)
    trainer.add_callback(GradualUnfreezingCallback())
    trainer.train()
    assert not any("embeddings" in name for moved in watch.moved for name in moved)
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())


@pytest.mark.skipif(not FIVE, reason="the plain Trainer of 4.57 is not bit-exact on resume")
def test_a_checkpoint_is_the_plain_trainer_s(tmp_path: Path) -> None:
    """Same files, same optimizer groups: a plain Trainer goes on from it."""
    trainer = make(tmp_path, save_strategy="steps", save_steps=4)
    trainer.add_callback(GradualUnfreezingCallback(layer_decay=0.5))
    trainer.train()
    plain = make(tmp_path / "plain", bert(), save_strategy="steps", save_steps=4)
    plain.train()
    names = [
        {p.name for p in (folder / "checkpoint-4").iterdir()}
        for folder in (tmp_path, tmp_path / "plain")
    ]
    assert names[0] == names[1]
    plain = make(tmp_path / "plain", bert())
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert plain.state.global_step == STEPS


def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.add_callback(GradualUnfreezingCallback())
    for _ in range(2):
        trainer.train()
        phases = [entry["unfreezing/phase"] for entry in trainer.state.log_history[:STEPS]]
        assert phases == [0, 0, 1, 1, 2, 2, 3, 3]
