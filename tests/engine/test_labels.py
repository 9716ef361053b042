"""Labels of target rows: hidden in every form, never trained on, nor a source row's for them."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import BertForQuestionAnswering, Trainer

from hf_adapt import MMD, AdaptationCallback, InformationMaximization, adapt
from hf_adapt.engine.labels import IGNORED, has_token_labels, label_of
from hf_adapt.engine.streams import Stream
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments

SOURCE, TARGET = rows(12, 1), rows(9, 2, labels=None)
LABELS = {"good": 0, "bad": 1, "so-so": 2}
NAMES = list(LABELS)


@pytest.mark.parametrize("forward", ["joint", "separate"])
@pytest.mark.parametrize("labelled", ["target has none", "target has its own"])
@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "tokens"])
def test_a_collator_that_looks_labels_up(
    per_token: bool, labelled: str, forward: Any, tmp_path: Path
) -> None:
    """It cannot read -100; target rows are collated with a source row's label, then hidden."""

    def named(data: datasets.Dataset) -> list[dict[str, Any]]:
        return [
            {
                **row,
                "label": [NAMES[t % 3] for t in row["input_ids"]]
                if per_token
                else NAMES[len(row["input_ids"]) % 3],
            }
            for row in data
        ]

    seen = []

    def look_up(features: Any) -> Any:
        labels = [row["label"] for row in features]
        numbers = [[LABELS[x] for x in own] if per_token else LABELS[own] for own in labels]
        rows = [{**row, "labels": n} for row, n in zip(features, numbers, strict=True)]
        batch = collate(rows)
        seen.append(batch)
        return batch

    trainer = Trainer(
        bert("token" if per_token else "sequence"),
        arguments(tmp_path, remove_unused_columns=False),
        train_dataset=named(SOURCE),
        data_collator=look_up,
    )
    target = named(TARGET) if labelled == "target has its own" else TARGET.to_list()
    trainer.add_callback(
        AdaptationCallback(
            MMD(), InformationMaximization(), target_dataset=Stream(target, forward=forward)
        )
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss/mmd"] != 0
    for batch in seen:
        if forward == "joint":
            assert bool((batch["labels"][4:] == -100).all())
            assert bool(
                (batch["labels"][:4] != -100).flatten(1).any(1).all() if per_token else True
            )
            assert per_token or bool((batch["labels"][:4] != -100).all())


def test_a_collator_that_hides_its_labels_under_another_name_is_refused(tmp_path: Path) -> None:
    def look_up(features: Any) -> Any:
        batch = collate([{k: v for k, v in row.items() if k != "label"} for row in features])
        return {**batch, "gold": torch.tensor([LABELS[row["label"]] for row in features])}

    source = [{**row, "label": "good"} for row in rows(12, 1, labels=None)]
    trainer = Trainer(
        bert(),
        arguments(tmp_path, remove_unused_columns=False),
        train_dataset=source,
        data_collator=look_up,
        callbacks=[AdaptationCallback(MMD(), target_dataset=TARGET)],
    )
    with pytest.raises(ValueError, match=r"none of the label columns.*label_names=\[\.\.\.\]"):
        trainer.train()


# ---- labels: a target's own are never trained on, nor a source row's in their place ----


def own_loss(read: Any) -> type[Trainer]:
    class Own(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
        ) -> Any:
            inputs = dict(inputs)
            kwargs.pop("num_items_in_batch", None)
            labels = read(inputs)
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    return Own


def adapted(
    folder: Path, cls: type[Trainer], collator: Any, source: Any, target: Any, **settings: Any
) -> Trainer:
    forward = settings.pop("forward", "joint")
    model = settings.pop("model", None)
    return cls(
        bert() if model is None else model,
        arguments(folder, remove_unused_columns=False, **settings),
        train_dataset=source,
        data_collator=collator,
        callbacks=[AdaptationCallback(MMD(), target_dataset=Stream(target, forward=forward))],
    )


def under_y(features: Any) -> Any:
    batch = collate([{k: v for k, v in row.items() if k != "y"} for row in features])
    return {**batch, "y": torch.tensor([row["y"] for row in features])}


@pytest.mark.parametrize("zero_head", [False, True])
def test_labels_under_another_name_are_not_trained_on(zero_head: bool, tmp_path: Path) -> None:
    """Their loss may be that of the source rows by luck, or because the head is all zeros."""
    cls = own_loss(lambda inputs: inputs.pop("y"))
    source, target = (rows(12, seed).rename_column("labels", "y") for seed in (1, 2))
    model = bert()
    if zero_head:
        torch.nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ValueError, match=r"their predictions change it.*label_names=\[\.\.\.\]"):
        adapted(tmp_path, cls, under_y, source, target, model=model).train()
    trainer = adapted(tmp_path, cls, under_y, source, target, label_names=["y"])
    trainer.train()  # as advised
    separate = adapted(tmp_path, cls, under_y, source, target, forward="separate")
    separate.train()
    assert trainer.state.log_history[0]["loss/task"] == pytest.approx(
        separate.state.log_history[0]["loss/task"], rel=1e-4
    )


@pytest.mark.parametrize("seed", range(4))
def test_what_is_made_of_a_stand_in_label_is_not_trained_on(seed: int, tmp_path: Path) -> None:
    def soft(features: Any) -> Any:
        batch = collate(features)
        one_hot = torch.nn.functional.one_hot(batch["labels"], 3)  # fails on -100
        return {**batch, "soft": one_hot.float()}

    def read(inputs: Any) -> Any:
        inputs.pop("labels", None)
        return inputs.pop("soft")

    trainer = adapted(tmp_path, own_loss(read), soft, SOURCE, TARGET, model=bert(seed=seed))
    with pytest.raises(ValueError, match="does not ignore unlabelled target rows"):
        trainer.train()


@pytest.mark.parametrize("seed", range(4))
def test_question_answering_is_refused_whatever_its_weights(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model = BertForQuestionAnswering(bert(num_labels=2).config)
    torch.nn.init.zeros_(model.qa_outputs.weight)
    source = [{**row, "start_positions": 1, "end_positions": 2} for row in rows(12, 1, labels=None)]

    def spans(features: Any) -> Any:
        names = ("start_positions", "end_positions")
        batch = collate([{k: v for k, v in row.items() if k not in names} for row in features])
        return batch | {n: torch.tensor([row[n] for row in features]) for n in names}

    with pytest.raises(ValueError, match="does not ignore unlabelled target rows"):
        adapted(tmp_path, Trainer, spans, source, TARGET, model=model).train()


def test_a_list_of_labels_cannot_be_hidden(tmp_path: Path) -> None:
    def listed(features: Any) -> Any:
        batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in features])
        return {**batch, "labels": [{"boxes": row["labels"]} for row in features]}

    cls = own_loss(lambda inputs: torch.tensor([x["boxes"] for x in inputs.pop("labels")]))
    with pytest.raises(ValueError, match=r"list of 'labels'.*forward='separate'"):
        adapted(tmp_path, cls, listed, SOURCE, TARGET).train()
    adapted(tmp_path, cls, listed, SOURCE, TARGET, forward="separate").train()


def test_a_collator_that_changes_rows_before_it_fails(tmp_path: Path) -> None:
    widths, calls = [], []

    def popping(features: Any) -> Any:
        calls.append(len(features))
        for row in features:
            row["input_ids"] = [*row["input_ids"], 1]
            row["attention_mask"].append(1)
        labels = [LABELS[row.pop("labels")] for row in features]
        batch = collate(features)
        widths.append(batch["attention_mask"].sum(1).tolist())
        return {**batch, "labels": torch.tensor(labels)}

    source = [{**row, "labels": "good"} for row in rows(12, 1, labels=None)]
    lengths = {len(row["input_ids"]) + 1 for row in [*source, *TARGET]}
    adapted(tmp_path, Trainer, popping, [dict(r) for r in source], TARGET).train()
    assert {width for batch in widths for width in batch} <= lengths  # not prepared twice
    assert len(calls) == len(widths) + 1  # it fails once, and is not asked again


def test_a_collator_s_own_mistake_is_shown_as_it_is(tmp_path: Path) -> None:
    def broken(features: Any) -> Any:
        raise KeyError("my own mistake")

    source, target = (data.with_format("torch") for data in (SOURCE, TARGET))
    with pytest.raises(KeyError, match="my own mistake"):
        adapted(tmp_path, Trainer, broken, source, target).train()


@pytest.mark.parametrize("form", ["list", "floats", "tensor"])
def test_a_vector_of_labels_as_long_as_a_row_is_not_one_for_each_token(
    form: str, tmp_path: Path
) -> None:
    def vectors(data: datasets.Dataset) -> list[dict[str, Any]]:
        made = []
        for row in data:
            label: Any = [1, 0, 1, 0]
            label = {"list": label, "floats": [float(x) for x in label]}.get(
                form, torch.tensor(label)
            )
            made.append({**row, "labels": label})
        return made

    source = vectors(rows(12, 1))
    source[0]["input_ids"], source[0]["attention_mask"] = [5, 6, 7, 8], [1] * 4
    widths = []

    def stacked(features: Any) -> Any:
        batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in features])
        labels = [torch.as_tensor(row["labels"]) for row in features]
        widths.append({len(label) for label in labels})
        return {**batch, "labels": torch.stack(labels).float()}

    model = bert(num_labels=4, problem_type="multi_label_classification")
    adapted(tmp_path, Trainer, stacked, source, TARGET, model=model, forward="separate").train()
    assert all(width == {4} for width in widths)


def test_labels_that_are_to_be_used_must_be_there(tmp_path: Path) -> None:
    target = rows(9, 2).rename_column("labels", "label_of_target")
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=SOURCE, data_collator=collate)
    adapt(trainer, MMD(), target_dataset=Stream(target, labels="keep"))
    with pytest.raises(ValueError, match=r"labels='keep', but .* none of the label"):
        trainer.train()


def test_a_label_of_every_form() -> None:
    assert label_of(2, IGNORED) == -100 and label_of(0.5, IGNORED) == -100.0
    assert label_of([1, 2, 3], IGNORED, 5) == [-100] * 5
    assert label_of(torch.tensor([1, 2]), IGNORED, 3).tolist() == [-100] * 3
    assert label_of(torch.tensor(1.5), IGNORED).dtype == torch.float32
    row = {"input_ids": [1, 2], "whole": [0, 1], "half": [0.0, 1.0], "one": 1}
    assert [has_token_labels(row, key) for key in ("whole", "half", "one", "none")] == [
        True,
        False,
        False,
        False,
    ]
