"""Self-training: quotas by hand, and the loss of a run against one made by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorForTokenClassification, Trainer

from hf_adapt import Stream, adapt
from hf_adapt.alignment import SelfTraining, aligned_predictions, balanced_pseudo_labels
from hf_adapt.alignment.row_bank import RowBank
from tests.helpers.adaptation import InputRecorder
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.toy import tokenizer
from tests.helpers.trainers import arguments

PRIORS = (0.5, 0.3, 0.2)


def test_aligned_predictions_have_the_given_mean_and_keep_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(200, 3, generator=generator).mul(3).softmax(1)
    priors = torch.tensor([0.1, 0.2, 0.7])
    aligned = aligned_predictions(p, priors)
    torch.testing.assert_close(aligned.mean(0), priors, atol=1e-4, rtol=0)
    # One bias for each class: log ratios between two classes differ by a constant.
    change = (aligned / p).log()
    torch.testing.assert_close(
        (change[:, 0] - change[:, 2]).std(), torch.tensor(0.0), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(aligned_predictions(p, p.mean(0)), p, atol=1e-5, rtol=1e-4)


def test_of_each_class_the_most_confident_share_is_kept() -> None:
    """Of ten rows, 60 % of frequency .3 and .7: 1.8 and 4.2 rows, rounded."""
    first = torch.tensor([0.99, 0.9, 0.8, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.01])
    labels, kept = balanced_pseudo_labels(
        torch.stack([first, 1 - first], 1), torch.tensor([0.3, 0.7]), 0.6
    )
    assert labels.tolist() == [0] * 3 + [1] * 7
    assert kept.tolist() == [True, True, False] + [False] * 3 + [True] * 4


@pytest.mark.parametrize("priors", [(1.0, 0.0), (0.0, 1.0)])
def test_a_class_of_frequency_0_keeps_no_row(priors: tuple[float, float]) -> None:
    p = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)).softmax(1)
    labels, kept = balanced_pseudo_labels(p, torch.tensor(priors), 1.0)
    assert labels[kept].tolist() == [priors.index(1.0)] * int(kept.sum())
    assert int(kept.sum()) >= 18


def test_more_classes_than_rows() -> None:
    p = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)).softmax(1)
    labels, kept = balanced_pseudo_labels(p, torch.full((8,), 1 / 8), 1.0)
    assert labels.shape == kept.shape == (3,)


def test_a_bank_keeps_one_of_equal_rows_and_knows_what_it_has_not() -> None:
    bank = RowBank()
    assert not bank.find(torch.tensor([1]))[1].any()
    bank.fill(torch.tensor([9, -4, 9, 2]), x=torch.tensor([1.0, 2.0, 1.0, 3.0]))
    places, known = bank.find(torch.tensor([2, 100, -4, -100, 9]))
    assert len(bank) == 3 and known.tolist() == [True, False, True, False, True]
    assert bank.values["x"][places[known]].tolist() == [3.0, 2.0, 1.0]
    again = RowBank()
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.find(torch.tensor([2]))[0], bank.find(torch.tensor([2]))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0.0, 0.5)}, "two numbers above 0 and at most 1"),
        ({"shares": (0.5,)}, "two numbers above 0"),
        ({"refreshes": ()}, "at least one number from 0 to below 1"),
        ({"refreshes": (1.0,)}, "at least one number from 0 to below 1"),
        ({"teacher_decay": 1.0}, r"teacher_decay=1.0 must lie in \[0, 1\)"),
        ({"weight": -1.0}, "finite number >= 0"),
    ],
)
def test_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfTraining(**options)


def test_shares_grow_over_the_refreshes() -> None:
    method = SelfTraining(shares=(0.2, 0.8), refreshes=(0.25, 0.5, 0.75))
    found = {step: method.share_at(step, 40) for step in range(40)}
    assert {s: v for s, v in found.items() if v is not None} == pytest.approx(
        {10: 0.2, 20: 0.5, 30: 0.8}
    )
    assert SelfTraining(shares=(0.2, 0.8), refreshes=(0.5,)).share_at(20, 40) == 0.8


def test_the_loss_is_that_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    """Two micro-batches; the model labels the rows before the step, in evaluation mode."""
    source, target = rows(8, 1), rows(8, 2, None, low=20)
    trainer = Trainer(
        bert(dropout=False),
        arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2, learning_rate=0.0),
        train_dataset=source,
        data_collator=collate,
    )
    method = SelfTraining(shares=(0.5, 0.5), refreshes=(0.0,), prior=PRIORS)
    adapt(trainer, method, target_dataset=target).train()

    with torch.no_grad():
        logits = trainer.model.eval()(**collate(list(target))).logits
    labels, kept = balanced_pseudo_labels(logits.softmax(1), torch.tensor(PRIORS), 0.5)
    wanted = F.cross_entropy(logits[kept], labels[kept])
    assert 0 < int(kept.sum()) < 8
    assert trainer.state.log_history[0]["loss/self_training"] == pytest.approx(
        wanted.item(), abs=1e-5
    )


def test_a_sparse_head_of_tokens_and_a_view_that_drops_some(tmp_path: Path) -> None:
    def shorter(inputs: dict[str, Any]) -> dict[str, Any]:
        mask = inputs["attention_mask"].clone()
        mask[:, 2] = 0
        return {**inputs, "attention_mask": mask}

    trainer = Trainer(
        bert("token"),
        arguments(tmp_path, max_steps=2),
        train_dataset=rows(8, 1, "token"),
        data_collator=collate,
    )
    method = SelfTraining(refreshes=(0.0,), view=shorter)
    adapt(trainer, method, target_dataset=rows(8, 2, None))
    with pytest.raises(ValueError, match="it must keep the attention mask"):
        trainer.train()


def test_rows_without_a_label_are_left_out_of_the_forward(tmp_path: Path) -> None:
    """Before the first refresh none of the target's goes through; then half of them."""
    trainer = Trainer(
        bert(),
        arguments(tmp_path, max_steps=2, per_device_train_batch_size=8, learning_rate=0.0),
        train_dataset=rows(8, 1),
        data_collator=collate,
    )
    method = SelfTraining(shares=(0.5, 0.5), refreshes=(0.5,), prior=PRIORS)
    adapt(trainer, method, target_dataset=rows(8, 2, None, low=20))
    recorder = InputRecorder(trainer.model)
    trainer.train()
    sizes = [len(inputs["input_ids"]) for inputs in recorder.inputs]
    assert sizes[-2:] == [8, 8 + len(method.bank)] and 0 < len(method.bank) < 8


def test_a_tagger_whose_longest_rows_are_left_out(tmp_path: Path) -> None:
    """Without their padding, the others are still what a model's own loss can read."""
    target = [{"input_ids": [20 + i % 9] * (24 if i % 2 else 3)} for i in range(20)]
    trainer = Trainer(
        bert("token"),
        arguments(tmp_path, max_steps=4),
        train_dataset=[{"input_ids": [7, 8, 9], "labels": [0, 1, 2]}] * 20,
        data_collator=DataCollatorForTokenClassification(tokenizer()),
    )
    adapt(trainer, SelfTraining(refreshes=(0.5,)), target_dataset=target).train()


def test_a_view_of_a_stream_of_its_own_before_any_row_has_a_label(tmp_path: Path) -> None:
    trainer = Trainer(
        bert(), arguments(tmp_path, max_steps=3), train_dataset=rows(8, 1), data_collator=collate
    )
    method = SelfTraining(shares=(1, 1), refreshes=(0.5,), view=dict, prior=PRIORS)
    adapt(trainer, method, target_dataset=Stream(rows(8, 2, None), forward="separate")).train()
    assert trainer.state.log_history[0]["loss/self_training"] == 0
    assert trainer.state.log_history[2]["loss/self_training"] > 0


def test_rows_that_change_between_reads_are_refused_before_training(tmp_path: Path) -> None:
    def shuffled(batch: dict[str, Any]) -> dict[str, Any]:
        mixed = [[ids[i] for i in torch.randperm(len(ids))] for ids in batch["input_ids"]]
        return {**batch, "input_ids": mixed}

    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=rows(8, 1), data_collator=collate)
    adapt(trainer, SelfTraining(), target_dataset=rows(8, 2, None).with_transform(shuffled))
    with pytest.raises(ValueError, match=r"others each time they are read.*view="):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_most_confident_rows_are_found_where_softmax_is_1() -> None:
    margins = torch.tensor([20.0, 26.0, 22.0, 24.0])
    p = torch.stack([margins, torch.zeros(4)], 1).softmax(1)
    assert p[:, 0].unique().numel() == 1
    _, kept = balanced_pseudo_labels(p, torch.tensor([1.0, 0.0]), 0.5)
    assert kept.tolist() == [False, True, False, True]
