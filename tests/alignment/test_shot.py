"""SHOT: centroids by hand, what is frozen, what labels do, and a target that is found again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_adapt import AdaptationCallback, adapt
from hf_adapt.alignment import SHOT, centroid_labels, shot
from hf_adapt.unfreezing import LPFT, FreezeOnly, GradualUnfreezing
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.toy import tokenizer
from tests.helpers.trainers import arguments, same_bits, weights


def test_centroids_by_hand() -> None:
    """Row 1 is predicted as class 1 and lies by class 0's centroid."""
    features = torch.tensor([[4.0, 0.0], [3.0, 1.0], [0.0, 4.0], [1.0, 3.0]])
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.2, 0.8]])
    x = torch.cat([features, torch.ones(4, 1)], 1)
    x = x / x.norm(dim=1, keepdim=True)
    centroids = torch.stack([(p[:, k : k + 1] * x).sum(0) / p[:, k].sum() for k in range(2)])
    centroids = centroids / centroids.norm(dim=1, keepdim=True)
    assert centroid_labels(features, p, rounds=0).tolist() == (x @ centroids.T).argmax(1).tolist()
    assert centroid_labels(features, p).tolist() == [0, 0, 1, 1]


def test_a_class_that_no_row_has_gets_none() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert centroid_labels(torch.eye(2), p).tolist() == [0, 1]


def test_the_head_stays_and_labels_do_not_matter(tmp_path: Path) -> None:
    found = []
    for name, seed in (("none", None), ("some", 7)):
        data = rows(12, 2, None)
        if seed is not None:
            data = data.add_column("labels", [row["labels"] for row in rows(12, seed)])
        model = bert(dropout=True)
        before = weights(model)
        args = arguments(tmp_path / name, max_steps=4, seed=3)
        shot(model, data, args, data_collator=collate, target_priors=[0.5, 0.3, 0.2])
        after = weights(model)
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved and not any(key.startswith("classifier") for key in moved)
        assert all(parameter.requires_grad for parameter in model.parameters())
        found.append(after)
    assert same_bits(*found)


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
        trainer = Trainer(
            bert(dropout=True),
            arguments(folder, max_steps=6, save_strategy="steps", save_steps=2, num_train_epochs=2),
            train_dataset=rows(12, 2, None),
            data_collator=collate,
        )
        adapt(trainer, SHOT()).train(resume_from_checkpoint=resume and str(resume))
        return weights(trainer.model)

    whole = run(tmp_path / "whole")
    assert same_bits(whole, run(tmp_path / "again", tmp_path / "whole" / "checkpoint-2"))


def test_labels_out_of_range_are_not_looked_at(tmp_path: Path) -> None:
    """As in public test splits, whose labels are -1."""
    data = rows(12, 2, None).add_column("labels", [-1] * 12)
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=data, data_collator=collate)
    adapt(trainer, SHOT()).train()


@pytest.mark.parametrize("given", [{"target_dataset": rows(8, 2, None)}, {"target_priors": [1, 0]}])
def test_a_target_beside_it_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    """It would adapt to the source's rows."""
    args = arguments(tmp_path)
    trainer = Trainer(bert(), args, train_dataset=rows(12, 1), data_collator=collate)
    with pytest.raises(ValueError, match="pass the target's rows there"):
        adapt(trainer, SHOT(), **given).train()


def test_the_trainer_goes_on_without_it(tmp_path: Path) -> None:
    """Its optimizer has the head, for a later run and for a plain Trainer that resumes."""
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = Trainer(bert(), args, train_dataset=rows(12, 2), data_collator=collate)
    callback = AdaptationCallback(SHOT())
    trainer.add_callback(callback)
    trainer.train()
    trainer.remove_callback(callback)
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(before["classifier.weight"], trainer.model.classifier.weight)
    plain = Trainer(bert(), args, train_dataset=rows(12, 2), data_collator=collate)
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_micro_batch_without_items(tmp_path: Path) -> None:
    words = tokenizer()
    data = [{"input_ids": [words.cls_token_id, 5 + i, words.sep_token_id]} for i in range(5)]
    data.append({"input_ids": [words.cls_token_id, words.sep_token_id]})
    trainer = Trainer(
        bert("token"),
        arguments(tmp_path, max_steps=6, per_device_train_batch_size=1),
        train_dataset=data,
        processing_class=words,
    )
    adapt(trainer, SHOT()).train()
    assert all(bool(value.isfinite().all()) for value in weights(trainer.model).values())


@pytest.mark.parametrize("prior", ["source", "estimate"])
def test_frequencies_of_a_source_are_refused(prior: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no source rows, so prior='{prior}'"):
        shot(bert(), rows(8, 1, None), arguments(tmp_path), None, collate, prior)


def test_the_head_of_a_model_with_adapters_stays(tmp_path: Path) -> None:
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False))
    before = weights(model)
    shot(model, list(rows(12, 2, None)), arguments(tmp_path), data_collator=collate)
    moved = {key for key, value in weights(model).items() if not torch.equal(before[key], value)}
    assert moved and not any("classifier" in key for key in moved)


def test_a_schedule_leaves_the_head_alone(tmp_path: Path) -> None:
    def trainer(schedule: Any) -> Trainer:
        args = arguments(tmp_path, max_steps=4)
        made = Trainer(bert(), args, train_dataset=rows(12, 2, None), data_collator=collate)
        return adapt(made, SHOT(), GradualUnfreezing(schedule))

    adapted = trainer(FreezeOnly("embeddings"))
    before = weights(adapted.model)
    adapted.train()
    moved = {k for k, value in weights(adapted.model).items() if not torch.equal(before[k], value)}
    assert moved and not any(key.startswith(("classifier", "bert.embeddings")) for key in moved)
    assert all(parameter.requires_grad for parameter in adapted.model.parameters())
    with pytest.raises(ValueError, match=r"trains only head, .* holds fixed"):
        trainer(LPFT()).train()


def test_a_stream_is_refused_before_training(tmp_path: Path) -> None:
    trainer = Trainer(
        bert(),
        arguments(tmp_path),
        train_dataset=rows(12, 2, None).to_iterable_dataset(),
        data_collator=collate,
    )
    with pytest.raises(ValueError, match=r"a dataset of this run is a stream\. Make it map-style"):
        adapt(trainer, SHOT()).train()
