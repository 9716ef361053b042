"""Bad input is refused before any training step, with the fix; nothing saved is lost."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForQuestionAnswering, Trainer, TrainerCallback

from hf_adapt import (
    DANN,
    MMD,
    AdaptationCallback,
    DomainAdversarialCallback,
    InformationMaximization,
    Objective,
    adapt,
)
from hf_adapt.engine.streams import Stream
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments, same_bits, weights


def trainer_with(folder: Path, model: Any = None, source: Any = None, **settings: Any) -> Trainer:
    return Trainer(
        model if model is not None else bert(),
        arguments(folder, **settings),
        train_dataset=source if source is not None else rows(12, 1),
        data_collator=collate,
    )


def refused(trainer: Trainer, match: str, error: type[Exception] = ValueError) -> None:
    """train() raises before the first optimizer step: no weight has moved."""
    before = weights(trainer.model)
    with pytest.raises(error, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same_bits(before, weights(trainer.model))
    hooks = [m for m in trainer.model.modules() if m._forward_hooks]
    assert not hooks, "the model must be left without a trace"
    assert "RunCallback" not in [type(c).__name__ for c in trainer.callback_handler.callbacks]


def test_an_empty_target(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    trainer.add_callback(DomainAdversarialCallback(target_dataset=rows(3, 1).select([])))
    refused(trainer, "target_dataset is empty")


def test_no_target_at_all(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    trainer.add_callback(DomainAdversarialCallback())
    refused(trainer, "dann needs target rows: pass target_dataset=")


def test_a_target_without_the_models_columns(tmp_path: Path) -> None:
    target = rows(9, 2, None).remove_columns("attention_mask")
    trainer = adapt(trainer_with(tmp_path), MMD(), target_dataset=target)
    refused(trainer, "lacks the column.*'attention_mask'.*tokenise")


def test_an_unknown_feature_layer_names_near_ones(tmp_path: Path) -> None:
    objective = DANN(feature_layer="bert.encoder.layers.1")
    trainer = adapt(trainer_with(tmp_path), objective, target_dataset=rows(9, 2, None))
    refused(trainer, r"not a module.*Near names:.*bert\.encoder\.layer\.1")


def test_a_feature_layer_that_captures_nothing(tmp_path: Path) -> None:
    class Unused(type(bert())):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.spare = torch.nn.Linear(2, 2)

    torch.manual_seed(0)
    model = Unused(bert().config)
    trainer = adapt(
        trainer_with(tmp_path, model), DANN(feature_layer="spare"), target_dataset=rows(9, 2, None)
    )
    refused(trainer, "captured nothing")


def test_a_frozen_feature_layer(tmp_path: Path) -> None:
    model = bert()
    model.bert.requires_grad_(False)
    trainer = adapt(trainer_with(tmp_path, model), MMD(), target_dataset=rows(9, 2, None))
    refused(trainer, "without a gradient")


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_heads_that_take_minus_100_for_a_label(problem: str, tmp_path: Path) -> None:
    size = 1 if problem == "regression" else 3
    model = bert(num_labels=size, problem_type=problem)
    value = 0.5 if size == 1 else [1.0, 0.0, 1.0]
    source = rows(12, 1, None).map(lambda row: {"labels": value})

    def pad(features: Any) -> Any:
        labels = torch.tensor([row["labels"] for row in features])
        bare = [{k: v for k, v in row.items() if k != "labels"} for row in features]
        return {**collate(bare), "labels": labels}

    trainer = trainer_with(tmp_path, model, source)
    trainer.data_collator = pad
    adapt(trainer, DANN(), target_dataset=rows(9, 2, None))
    refused(trainer, "does not ignore unlabelled target rows.*forward='separate'")


def question_answering(folder: Path) -> Trainer:
    settings = bert(num_labels=2).config
    torch.manual_seed(0)
    source = rows(12, 1, None).map(lambda row: {"start_positions": 1, "end_positions": 2})

    def pad(features: Any) -> Any:
        names = ("start_positions", "end_positions")
        bare = [{k: v for k, v in row.items() if k not in names} for row in features]
        return {**collate(bare), **{n: torch.tensor([row[n] for row in features]) for n in names}}

    trainer = trainer_with(folder, BertForQuestionAnswering(settings), source)
    trainer.data_collator = pad
    return trainer


def test_question_answering_would_learn_position_0_of_target_rows(tmp_path: Path) -> None:
    """Its loss clamps -100 to the first token instead of ignoring it."""
    trainer = adapt(question_answering(tmp_path), MMD(), target_dataset=rows(9, 2, None))
    refused(trainer, "does not ignore unlabelled target rows")


def test_question_answering_with_separate_forwards(tmp_path: Path) -> None:
    trainer = question_answering(tmp_path)
    adapt(trainer, MMD(), target_dataset=Stream(rows(9, 2, None), forward="separate")).train()
    assert trainer.state.log_history[0]["loss/mmd"] != 0  # unbiased: may be negative


def test_information_maximization_on_a_regression_head(tmp_path: Path) -> None:
    model = bert(num_labels=1, problem_type="regression")
    trainer = adapt(
        trainer_with(tmp_path, model), InformationMaximization(), target_dataset=rows(9, 2, None)
    )
    refused(trainer, "needs predictions over exclusive classes")


def test_data_parallel(tmp_path: Path) -> None:
    trainer = adapt(trainer_with(tmp_path), MMD(), target_dataset=rows(9, 2, None))
    trainer.args._n_gpu = 2
    refused(trainer, "DataParallel.*torchrun --nproc_per_node 2")


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("cls", [DANN, MMD, InformationMaximization])
def test_a_bad_weight(cls: Any, weight: float) -> None:
    with pytest.raises(ValueError, match=r"the weight must be a finite number >= 0"):
        cls(weight=weight)


def test_a_callback_added_too_late(tmp_path: Path) -> None:
    late = DomainAdversarialCallback(target_dataset=rows(9, 2, None))

    class AddsLate(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.add_callback(late)

    trainer = trainer_with(tmp_path)
    trainer.add_callback(AddsLate())
    refused(trainer, "was never attached", RuntimeError)


def test_the_same_callback_on_two_trainers(tmp_path: Path) -> None:
    callback = DomainAdversarialCallback(target_dataset=rows(9, 2, None))
    first, second = trainer_with(tmp_path), trainer_with(tmp_path)
    first.add_callback(callback)
    second.add_callback(callback)
    first.train()
    refused(second, "attached to another Trainer")


def test_a_callback_outlives_its_trainer(tmp_path: Path) -> None:
    callback = DomainAdversarialCallback(target_dataset=rows(9, 2, None))
    first = trainer_with(tmp_path)
    first.add_callback(callback)
    first.train()
    del first
    gc.collect()
    second = trainer_with(tmp_path)
    second.add_callback(callback)
    second.train()
    assert "loss/dann" in second.state.log_history[0]


def test_two_different_targets(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    trainer.add_callback(DomainAdversarialCallback(target_dataset=rows(9, 2, None)))
    trainer.add_callback(AdaptationCallback(MMD(), target_dataset=rows(9, 3, None)))
    refused(trainer, r"different target datasets.*target_dataset=\[a, b\]")


def test_two_adaptations_of_one_name(tmp_path: Path) -> None:
    trainer = adapt(trainer_with(tmp_path), DANN(), DANN(), target_dataset=rows(9, 2, None))
    refused(trainer, r"named 'dann'.*added twice.*remove_callback.*another name=")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdaptationCallback(MMD), r"the class MMD: write MMD\(\)"),
        (lambda: AdaptationCallback([MMD(), DANN()]), r"AdaptationCallback\(MMD\(\), DANN\(\)\)"),
        (
            lambda: AdaptationCallback(objectives=[MMD()]),
            "belongs to AdaptationTrainer.*one by one",
        ),
        (lambda: AdaptationCallback(MMD(), taget_dataset=[]), "keyword argument 'taget_dataset'"),
    ],
    ids=["class", "list", "objectives", "typo"],
)
def test_adaptations_passed_in_another_way(make: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        make()


def focal(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A focal loss by one-hot labels, as many scripts have it."""
    chances = outputs["logits"].log_softmax(-1)
    hot = torch.nn.functional.one_hot(labels, 3)
    return -((1 - chances.exp()) ** 2 * chances * hot).sum(-1).mean()


def gathered(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return -outputs["logits"].log_softmax(-1).gather(1, labels[:, None]).mean()


def weighted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    each = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")
    return (torch.tensor([1.0, 2.0, 1.0])[labels] * each).mean()


@pytest.mark.parametrize("loss", [focal, gathered, weighted])
def test_a_loss_that_cannot_take_minus_100(loss: Any, tmp_path: Path) -> None:
    def trainer(forward: Any) -> Trainer:
        made = Trainer(
            bert(),
            arguments(tmp_path),
            train_dataset=rows(12, 1),
            data_collator=collate,
            compute_loss_func=loss,
        )
        target = rows(9, 2, None)
        made.add_callback(AdaptationCallback(MMD(), target_dataset=Stream(target, forward=forward)))
        return made

    refused(trainer("joint"), "failed on unlabelled target rows.*forward='separate'")
    trainer("separate").train()


def test_a_loss_that_fails_on_source_rows_too_says_so_itself(tmp_path: Path) -> None:
    def broken(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        raise RuntimeError("sizes do not fit")

    trainer = Trainer(
        bert(),
        arguments(tmp_path),
        train_dataset=rows(12, 1),
        data_collator=collate,
        compute_loss_func=broken,
    )
    trainer.add_callback(AdaptationCallback(MMD(), target_dataset=rows(9, 2, None)))
    refused(trainer, "^sizes do not fit", RuntimeError)


def test_not_an_adaptation(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="passed as target_dataset="):
        adapt(trainer_with(tmp_path), rows(3, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected a transformers Trainer"):
        adapt(bert(), MMD())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ratio": 0}, "ratio=0 must be positive"),
        ({"forward": "both"}, "use 'joint' or 'separate'"),
        ({"labels": "seen"}, "use 'hide' or 'keep'"),
        ({"weight": 0.5}, "labels='keep'"),
    ],
)
def test_bad_options(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AdaptationCallback(MMD(), target_dataset=Stream(rows(3, 1), **options))


class Returns(Objective):
    """An objective whose loss returns what it is told."""

    needs_streams = ("target",)

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def loss(self, batch: Any) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.zeros(3), "expected a scalar tensor"),
        (None, "expected a scalar tensor"),
        ({"part": torch.zeros(2)}, "component 'part'"),
        ((torch.zeros(()), torch.ones(())), r"define num_items\(self, rows\)"),
    ],
)
def test_a_term_of_the_wrong_form(value: Any, match: str, tmp_path: Path) -> None:
    trainer = adapt(trainer_with(tmp_path), Returns(value), target_dataset=rows(9, 2, None))
    refused(trainer, match)


def test_an_objective_without_a_loss(tmp_path: Path) -> None:
    class Empty(Objective):
        pass

    refused(adapt(trainer_with(tmp_path), Empty()), "must define loss", NotImplementedError)


def test_a_nan_term_stops_with_its_name_and_saves_nothing(tmp_path: Path) -> None:
    class GoesNan(Objective):
        name = "unlucky"
        needs_streams = ("target",)

        def loss(self, batch: Any) -> torch.Tensor:
            features, _ = batch.features()
            term = features.square().mean()
            return term * float("nan") if batch.progress >= 0.5 else term

    trainer = adapt(
        trainer_with(tmp_path, max_steps=6, save_strategy="steps", save_steps=1),
        GoesNan(),
        MMD(),
        target_dataset=rows(9, 2, None),
    )
    with pytest.raises(FloatingPointError, match="term unlucky is NaN or infinite at step 3"):
        trainer.train()
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{i}" for i in (1, 2, 3)}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_loader_that_ignores_the_pairing(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                rows(12, 1).to_list(), batch_size=4, collate_fn=collate
            )

    trainer = Own(bert(), arguments(tmp_path), train_dataset=rows(12, 1), data_collator=collate)
    adapt(trainer, DANN(), target_dataset=rows(9, 2, None))
    refused(trainer, "without its target rows.*self.train_dataset")
