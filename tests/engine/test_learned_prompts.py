"""PEFT's learned prompts: virtual tokens stand before a row's own and are no features of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import Trainer

from hf_adapt import DANN, MMD, AdaptationCallback, Distillation, Objective
from hf_adapt.distillation import HiddenStates
from hf_adapt.engine.streams import Stream
from hf_adapt.models.pooling import pool
from tests.helpers.data import collate, rows
from tests.helpers.models import bert, llama
from tests.helpers.trainers import arguments

KINDS = {
    "prompt": PromptTuningConfig,
    "p-tuning": PromptEncoderConfig,
    "prefix": PrefixTuningConfig,
}
HEADS = {
    "row": ("sequence", TaskType.SEQ_CLS),
    "lm": ("", TaskType.CAUSAL_LM),
}


class Watch(Objective):
    """Keeps what it was given."""

    needs_streams = ("target",)
    seen: Any = None

    def loss(self, batch: Any) -> torch.Tensor:
        features, domain = batch.features()
        logits, _ = batch.logits()
        self.seen = (features.detach(), domain, logits.detach(), batch.num_features())
        self.inputs = [{k: v.clone() for k, v in part.inputs.items()} for part in batch.parts]
        return features.square().mean() + logits.square().mean()


def made(kind: str, labels: str) -> Any:
    head, task = HEADS[labels]
    model = llama() if labels == "lm" else bert(head)
    torch.manual_seed(1)
    size = {"encoder_hidden_size": 16} if kind == "p-tuning" else {}
    return get_peft_model(model, KINDS[kind](task_type=task, num_virtual_tokens=3, **size))


# PEFT itself fails on token heads, and on a prefix for encoders of transformers 5.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("forward", ["joint", "separate"])
@pytest.mark.parametrize("pooling", ["mean", "tokens", "cls"])
@pytest.mark.parametrize(
    ("kind", "labels"), [("prompt", "row"), ("p-tuning", "row"), ("prompt", "lm"), ("prefix", "lm")]
)
def test_features_and_predictions_are_those_of_the_rows_own_tokens(
    kind: str, labels: str, pooling: Any, forward: Any, tmp_path: Path
) -> None:
    watch, model = Watch(pooling=pooling), made(kind, labels)
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=rows(12, 1, labels),
        data_collator=collate,
    )
    trainer.add_callback(
        AdaptationCallback(
            watch,
            DANN(pooling=pooling),
            MMD(pooling=pooling),
            target_dataset=Stream(rows(9, 2, None if labels == "row" else labels), forward=forward),
        )
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss/mmd"] != 0
    features, domain, logits, count = watch.seen
    assert len(features) == len(domain) == int(count)

    expected, predicted = [], []
    model.eval()
    with torch.no_grad():
        for inputs in watch.inputs:
            inputs.pop("labels", None)
            output = model(**inputs, output_hidden_states=True)
            mask = inputs["attention_mask"].bool()
            own = output.hidden_states[-1][:, -mask.shape[1] :]
            expected.append(pool(own, mask, pooling))
            real = output.logits
            predicted.append(real if real.ndim == 2 else real[:, -mask.shape[1] :][mask])
    torch.testing.assert_close(features, torch.cat(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, torch.cat(predicted).float(), rtol=1e-4, atol=1e-5)


def test_hidden_states_are_distilled_at_the_rows_own_tokens(tmp_path: Path) -> None:
    trainer = Trainer(
        made("prompt", "row"),
        arguments(tmp_path),
        train_dataset=rows(12, 1),
        data_collator=collate,
        callbacks=[AdaptationCallback(Distillation(bert(seed=1), features=[HiddenStates()]))],
    )
    trainer.train()
    assert trainer.state.log_history[0]["distillation/hidden_states"] > 0
