"""Consolidation, against trainings that are followed by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_adapt import adapt
from hf_adapt.continual import Consolidation
from tests.helpers.points import Point, descent


@pytest.mark.parametrize("form", ["decoupled", "gradient"])
def test_both_forms_end_at_the_minimum_of_the_penalised_loss(form: Any, tmp_path: Path) -> None:
    model = Point(0.0, 0.0, 0.0)
    fisher = {"theta": torch.tensor([3.0, 0.0, 1.0])}
    trainer = descent(model, tmp_path, 600)
    adapt(trainer, Consolidation(fisher, strength=2.0, form=form)).train()
    torch.testing.assert_close(model.theta.detach(), torch.tensor([0.25, 1.0, 0.5]))
    penalty = 2.0 / 2 * (3 * 0.25**2 + 0.5**2)
    assert trainer.state.log_history[0]["consolidation/penalty"] == pytest.approx(penalty, rel=1e-4)
