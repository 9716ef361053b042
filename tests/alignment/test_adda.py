"""ADDA: the target's features are trained towards those of a frozen source model."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hf_adapt.alignment import ADDA
from tests.helpers.data import collate
from tests.helpers.methods import make_trainer
from tests.helpers.models import bert
from tests.helpers.trainers import GradientRecorder, same_bits, weights


def test_gradient_is_that_of_target_features_against_the_source_models(tmp_path: Path) -> None:
    kept = []

    def keep(features):
        kept.append(collate(features))
        return kept[-1]

    model, source_model, recorder = bert(), bert(seed=3), GradientRecorder()
    adda = ADDA(source_model, 0.5, ramp=None, bounded=False, learning_rate=1e-9)
    trainer = make_trainer(
        tmp_path, [adda], model, callbacks=[recorder], max_steps=1, max_grad_norm=0, learning_rate=0
    )
    trainer.data_collator = keep
    trainer.train()

    batch = {key: value for key, value in kept[0].items() if key != "domain"}
    domain = (batch.pop("labels") == -100).long()

    def features(of):
        hidden = of(**batch, output_hidden_states=True).hidden_states[-1]
        mask = batch["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    mixed = torch.where(domain.bool()[:, None], features(model), features(source_model).detach())
    model.zero_grad()
    (-0.5 * F.cross_entropy(adda.module(mixed), domain)).backward()
    encoder = [
        p for n, p in model.named_parameters() if "pooler" not in n and "classifier" not in n
    ]
    expected = torch.cat([p.grad.flatten() for p in encoder]).double()
    size = expected.numel()
    torch.testing.assert_close(recorder.gradients[0][:size], expected, rtol=1e-3, atol=1e-8)
    assert (recorder.gradients[0][size:] == 0).all()


def test_head_and_source_model_stay_and_the_head_is_free_again(tmp_path: Path) -> None:
    model = bert()
    adda = ADDA(copy.deepcopy(model), ramp=None, bounded=False)
    before = weights(model)
    make_trainer(tmp_path, [adda], model, weight_decay=0.1).train()
    assert same_bits(before, weights(adda.source_model))
    after = weights(model)
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert moved and not any(name.startswith("classifier") for name in moved)
    for each in (model, adda.source_model):
        assert all(parameter.requires_grad for parameter in each.parameters())


def test_refuses_the_model_itself(tmp_path: Path) -> None:
    model = bert()
    with pytest.raises(ValueError, match=r"source_model is the model that is trained.*deepcopy"):
        make_trainer(tmp_path, [ADDA(model)], model).train()
