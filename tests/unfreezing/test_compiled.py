"""Compiled runs, one after the other in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_adapt import MMD, AdaptationCallback, GradualUnfreezingCallback
from hf_adapt.engine.streams import Stream
from hf_adapt.unfreezing import Phase
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments


def run(folder: Path, callback: Any, compiled: str | None) -> list[float]:
    model: Any = bert(num_hidden_layers=1)
    settings: dict[str, Any] = {}
    if compiled == "arguments":
        settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    if compiled == "in place":
        model.compile(backend="eager")
    if compiled == "wrapped":
        model = torch.compile(model, backend="eager")
        settings = {"remove_unused_columns": False}  # its signature names no columns
    if compiled == "a layer":
        model.bert.encoder.layer[0].compile(backend="eager")
    trainer = Trainer(
        model,
        arguments(folder, max_steps=4, **settings),
        train_dataset=rows(16, 1),
        data_collator=collate,
    )
    if compiled == "wrapped":
        trainer.model_accepts_loss_kwargs = False  # transformers 4 is misled by the wrapper
    trainer.add_callback(callback)
    trainer.train()
    return [log["loss/mmd"] for log in trainer.state.log_history if "loss/mmd" in log]


@pytest.fixture
def compiler() -> Any:
    """Each phase is compiled anew, and torch gives up after a few: here after two."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("compiled", ["arguments", "in place", "wrapped", "a layer"])
def test_a_compiled_run_after_a_compiled_unfreezing_run(compiled: str, tmp_path: Path) -> None:
    """By the Trainer, or by the user before the Trainer has the model."""

    def mmd() -> AdaptationCallback:
        return AdaptationCallback(
            MMD(), target_dataset=Stream(rows(8, 2, None, low=35), forward="separate")
        )

    plain = run(tmp_path, mmd(), None)
    phases = [Phase(0, "head"), Phase(2, ["head", r"layer\..*"])]
    run(tmp_path, GradualUnfreezingCallback(phases), compiled)
    assert run(tmp_path, mmd(), compiled) == pytest.approx(plain, abs=1e-5)
