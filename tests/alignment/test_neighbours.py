"""ATDOC and AaD against formulas over all rows, whose model does not change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_adapt import adapt
from hf_adapt.alignment import ATDOC, AaD
from tests.helpers.data import collate, rows
from tests.helpers.models import bert, enlarged
from tests.helpers.trainers import arguments

COUNT, NEIGHBOURS = 12, 3


def run(method: Any, folder: Path, batch: int) -> tuple[Any, list[float]]:
    """The model after an epoch at a learning rate of 0, and the term at each step."""
    model = enlarged(bert(seed=2), 8)  # predictions that differ from row to row
    settings = {"learning_rate": 0.0, "logging_steps": 1, "max_steps": COUNT // batch}
    trainer = Trainer(
        model,
        arguments(folder, per_device_train_batch_size=batch, **settings),
        train_dataset=rows(COUNT, 1),
        data_collator=collate,
    )
    adapt(trainer, method, target_dataset=rows(COUNT, 2, None, low=20)).train()
    key = f"loss/{method.name}"
    return model, [entry[key] for entry in trainer.state.log_history if key in entry]


def by_hand(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted probabilities of the target rows, and who the neighbours of each are."""
    batch = collate(list(rows(COUNT, 2, None, low=20)))
    with torch.no_grad():
        found = model.eval()(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].unsqueeze(2)
    features = (found.hidden_states[-1] * mask).sum(1) / mask.sum(1)
    cosine = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=2)
    return found.logits.softmax(1), cosine.fill_diagonal_(-9).topk(NEIGHBOURS).indices


@pytest.mark.parametrize("batch", [COUNT, 1])
def test_atdoc_is_the_formula_whatever_the_batch_size(batch: int, tmp_path: Path) -> None:
    prior = torch.tensor([0.5, 0.3, 0.2])
    method = ATDOC(1.0, num_neighbours=NEIGHBOURS, prior=prior)
    model, found = run(method, tmp_path, batch)
    p, near = by_hand(model)
    q = prior * p**2 / (p**2).sum(0)
    confidence, labels = q[near].mean(1).max(1)
    assert len(labels.unique()) > 1
    losses = -p[torch.arange(COUNT), labels].log()
    if batch == 1:  # the confidence of a row alone cancels
        assert sum(found) == pytest.approx(losses.sum().item(), rel=1e-3)
    else:
        expected = (confidence * losses).sum() / confidence.sum()
        assert found == [pytest.approx(expected.item(), rel=1e-3)]
    kept = method.bank.values["predictions"]
    torch.testing.assert_close(kept.sort(0).values, (p**2).sort(0).values, rtol=1e-4, atol=1e-6)


def test_aad_is_the_formula(tmp_path: Path) -> None:
    model, found = run(AaD(1.0, num_neighbours=NEIGHBOURS), tmp_path, COUNT)
    p, near = by_hand(model)
    attraction = -(p[:, None] * p[near]).sum() / COUNT
    dispersion = ((p @ p.T).sum() - (p * p).sum()) / COUNT
    assert found == [pytest.approx((attraction + dispersion).item(), rel=1e-3)]
