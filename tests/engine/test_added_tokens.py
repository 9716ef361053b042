"""Tokens that a tokenizer adds to a text are no items of a head that classifies tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_adapt import Objective, adapt
from hf_adapt.alignment import ADDA, SelfTraining, TargetLanguageModeling
from tests.helpers import toy
from tests.helpers.models import bert
from tests.helpers.trainers import arguments

UNKNOWN, CLS, SEP, MASK = 1, 2, 3, 4


class Items(Objective):
    """Keeps what it sees of each micro-batch."""

    needs_streams = ("target",)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[dict[str, Any]] = []

    def num_items(self, rows: Any) -> Any:
        return rows.num_predictions()

    def loss(self, batch: Any) -> Any:
        (part,) = batch.parts
        ids, mask = part.inputs["input_ids"], part.attention_mask.bool()
        logits, domain = batch.logits()
        features, of_features = batch.features()
        masked = batch.forward(lambda inputs: {**inputs, "input_ids": torch.full_like(ids, MASK)})
        shorter = batch.forward(
            lambda inputs: (
                {**inputs, **{k: inputs[k][:, :4] for k in ("input_ids", "labels")}}
                | {"attention_mask": inputs["attention_mask"][:, :4]}
            )
        )
        self.seen.append(
            {
                "text": int((mask & (ids != CLS) & (ids != SEP)).sum()),
                "all": int(mask.sum()),
                "first": int((mask & (ids != CLS) & (ids != SEP))[:, :4].sum()),
                "shorter": len(shorter.logits()[0]),
                "items": [
                    *(len(each) for each in (logits, domain, features, of_features)),
                    *(len(each) for each in (batch.keys(), batch.row_keys(), batch.item_domain())),
                    *(len(batch.labels(of)) for of in ("logits", "features")),
                    *(len(each) for each in (masked.logits()[0], masked.features()[0])),
                    int(batch.num_predictions()),
                    int(batch.num_features()),
                ],
            }
        )
        return logits.sum() * 0.0, torch.tensor(len(logits))


def target() -> Any:
    made = toy.rows(8, 2, "none", keep=(), low=20)
    return made.map(lambda row: {"input_ids": [CLS, UNKNOWN, *row["input_ids"][2:]]})


def trained(
    folder: Path, method: Any, side: str = "right", knows: bool = True, **settings: Any
) -> Trainer:
    """A step of a tagger on rows with [CLS], [SEP] and an unknown word."""
    collate = toy.collator("token", side)
    trainer = Trainer(
        bert("token"),
        arguments(folder, max_steps=1, learning_rate=0.0),
        train_dataset=toy.rows(8, 1, "token", keep=()),
        data_collator=collate if knows else lambda rows: collate(rows),
        **settings,
    )
    adapt(trainer, method, target_dataset=target()).train()
    return trainer


@pytest.mark.parametrize("side", ["right", "left"])
def test_items_are_the_tokens_of_the_text(side: str, tmp_path: Path) -> None:
    """Also where a view masks them, or has fewer."""
    method = Items()
    trained(tmp_path, method, side)
    seen = method.seen[-1]
    assert set(seen["items"]) == {seen["text"]} and seen["text"] < seen["all"]
    assert seen["shorter"] == seen["first"]


def test_a_tokenizer_that_does_not_tell_them_from_words(tmp_path: Path) -> None:
    method, tokenizer = Items(), toy.tokenizer()
    tokenizer.unk_token = tokenizer.cls_token = tokenizer.sep_token = "[CLS]"
    trained(tmp_path, method, processing_class=tokenizer)
    seen = method.seen[-1]
    assert set(seen["items"]) == {seen["all"]}


def test_pseudo_labels_and_predicted_frequencies_are_those_of_the_text(tmp_path: Path) -> None:
    method = SelfTraining(shares=(1.0, 1.0), refreshes=(0.0,))
    trainer = trained(tmp_path, method)
    batch = toy.collator()(list(target()))
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    kept = mask & (ids != CLS) & (ids != SEP)
    with torch.no_grad():
        mean = trainer.model.eval()(**batch).logits[kept].softmax(-1).mean(0)
    torch.testing.assert_close(method.state_dict()["priors"], (mean + 1 / len(mean)) / 2)
    assert 0 < len(method.bank) <= int(kept.sum())


@pytest.mark.parametrize("side", ["right", "left"])
def test_words_are_predicted_where_they_stand(side: str, tmp_path: Path) -> None:
    """As where the Trainer does not know the tokenizer, and all tokens are items."""
    values = []
    for knows in (True, False):
        options = {"mask_probability": 0.5, "warmup": 0}
        method = TargetLanguageModeling(tokenizer=toy.tokenizer(), **options)  # type: ignore[arg-type]
        trainer = trained(tmp_path, method, side, knows)
        values.append(trainer.state.log_history[0]["loss/target_language_modeling"])
    assert values[0] == values[1] > 1


def test_features_of_another_model_are_of_the_same_items(tmp_path: Path) -> None:
    trainer = trained(tmp_path, ADDA(bert("token", seed=1), ramp=None))
    assert trainer.state.log_history[0]["loss/adda"] > 0
