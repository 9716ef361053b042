"""Validation without target labels in the Trainer's own evaluation."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer

from hf_adapt import AdaptationCallback
from hf_adapt.alignment import MMD, SelfTraining
from hf_adapt.engine.callback import collect_items
from hf_adapt.evaluation import (
    LabelFreeValidation,
    estimate_accuracy,
    neighbor_agreement,
    validators,
)
from hf_adapt.evaluation.scores import VALIDATORS
from tests.helpers.data import collate, rows
from tests.helpers.heads import CASES
from tests.helpers.models import bert
from tests.helpers.sounds import sound_collate, sounds, wav2vec2
from tests.helpers.trainers import arguments, same_bits, weights

DEV = rows(34, 3)


def target(labels: str | None = None, number: int = 37) -> datasets.Dataset:
    return rows(number, 2, labels, low=20)


def trainer(folder: Path, *adaptations: Any, model: Any = None, **settings: Any) -> Trainer:
    options = {
        key: settings.pop(key) for key in ("target_dataset", "target_priors") if key in settings
    }
    callbacks = [AdaptationCallback(*adaptations, **options)] if adaptations else []
    return Trainer(
        bert(seed=4) if model is None else model,
        arguments(folder, **settings),
        train_dataset=rows(40, 1),
        eval_dataset=DEV,
        data_collator=collate,
        callbacks=callbacks,
    )


def values(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if "_target_" in key}


def by_hand(model: torch.nn.Module, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of each row alone."""
    features, logits = [], []
    model.eval()
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            found = model(ids, output_hidden_states=True)
        features.append(found.hidden_states[-1].mean(1))
        logits.append(found.logits)
    return torch.cat(features), torch.cat(logits)


def undecided() -> Any:
    """A model that gives the target all classes."""
    model = CASES["sequence"].model(0)
    _, logits = by_hand(model, target())
    with torch.no_grad():
        model.classifier.bias -= logits.mean(0)
    return model


def test_metrics_are_those_of_the_functions_on_outputs_by_hand(tmp_path: Path) -> None:
    prior = [0.5, 0.3, 0.2]
    made = trainer(tmp_path, LabelFreeValidation(target(), prior=prior))
    found = values(made.evaluate())
    _, source_logits = by_hand(made.model, DEV)
    _, logits = by_hand(made.model, target())
    labels = torch.tensor(DEV["labels"])
    expected = {
        "entropy": validators.entropy(logits),
        "im": validators.information_maximization(logits, prior),
        "nuclear_norm": validators.nuclear_norm(logits),
        "snd": validators.soft_neighborhood_density(logits),
        "class_balance": validators.class_balance(logits, prior),
        "ensv": 1.0,
        "accuracy_estimate": estimate_accuracy(source_logits, labels, logits).value,
    }
    for name, value in expected.items():
        assert found[f"eval_target_{name}"] == pytest.approx(value, rel=1e-4), name
    assert {f"eval_target_{name}" for name in VALIDATORS} < set(found)


def test_importance_weights_are_of_features_by_hand(tmp_path: Path) -> None:
    dev, other = rows(150, 3), rows(150, 5, None)
    made = trainer(tmp_path, LabelFreeValidation(other))
    made.eval_dataset = dev
    found = values(made.evaluate())
    (source, logits), (features, _) = by_hand(made.model, dev), by_hand(made.model, other)
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(dev["labels"]), reduction="none"
    )
    expected = validators.importance_weighted(source, losses, features)
    # The folds follow the order of the items, which is another one here.
    assert found["eval_target_iwv"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", ["list of rows", "stream", "two domains"])
@pytest.mark.parametrize("batch", [3, 64])
def test_batch_size_and_kind_of_data_set_change_nothing(
    kind: str, batch: int, tmp_path: Path
) -> None:
    given: Any = target()
    expected = values(trainer(tmp_path, LabelFreeValidation(given)).evaluate())
    if kind == "list of rows":
        given = RowList(given)
    elif kind == "stream":

        def make() -> Iterator[Any]:
            yield from target()

        given = datasets.IterableDataset.from_generator(make)
    else:
        given = [given.select(range(10)), given.select(range(10, 37))]
    made = trainer(tmp_path, LabelFreeValidation(given), per_device_eval_batch_size=batch)
    found = values(made.evaluate())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


class RowList(torch.utils.data.Dataset[Any]):
    """A data set of torch's own kind."""

    def __init__(self, data: Any) -> None:
        self.rows = list(data)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


@pytest.mark.parametrize("poison", [0, 2, 99, -7])
def test_target_labels_are_never_seen(poison: int, tmp_path: Path) -> None:
    settings = dict(eval_strategy="steps", eval_steps=1, logging_steps=1)

    def run(data: Any) -> Any:
        made = trainer(
            tmp_path, SelfTraining(), LabelFreeValidation(), target_dataset=data, **settings
        )
        made.train()
        logs = [values(entry) for entry in made.state.log_history]
        return [entry for entry in logs if entry], weights(made.model)

    plain, poisoned = run(target()), run(target().add_column("labels", [poison] * 37))
    assert plain[0] == poisoned[0] and len(plain[0]) == 3
    assert same_bits(plain[1], poisoned[1])


def test_a_metric_chooses_the_checkpoint_and_stops_early(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        MMD(),
        LabelFreeValidation(validators=["nuclear_norm"]),
        target_dataset=target(),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=8,
        learning_rate=0.002,
        model=undecided(),
        load_best_model_at_end=True,
        metric_for_best_model="eval_target_nuclear_norm",
    )
    made.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    made.train()
    seen = [
        entry["eval_target_nuclear_norm"]
        for entry in made.state.log_history
        if "eval_target_nuclear_norm" in entry
    ]
    assert made.state.best_metric == max(seen)
    best = 1 + int(np.argmax(seen))
    assert made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert len(seen) == min(8, best + 2)
    assert values(made.evaluate())["eval_target_nuclear_norm"] == pytest.approx(max(seen))


def test_neighbours_are_those_before_training(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        LabelFreeValidation(target(), validators=["neighbors"]),
        model=undecided(),
        eval_strategy="steps",
        eval_steps=3,
        learning_rate=0.0005,
    )
    features, _ = by_hand(copy.deepcopy(made.model), target())
    made.train()
    _, logits = by_hand(made.model, target())
    expected = neighbor_agreement(logits, features, num_classes=3)
    found = [entry.get("eval_target_neighbors") for entry in made.state.log_history]
    assert pytest.approx(expected, abs=1e-6) in found
    assert (
        "eval_target_neighbors" not in trainer(tmp_path, LabelFreeValidation(target())).evaluate()
    )


def test_the_ensemble_of_all_evaluations_survives_a_resume(tmp_path: Path) -> None:
    settings: Any = dict(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2, max_steps=4
    )
    settings |= dict(learning_rate=0.001, lr_scheduler_type="constant")

    def run(resume: Any = None) -> list[list[float]]:
        names = ["ensv", "neighbors"]
        model = undecided()
        validation = LabelFreeValidation(target(), validators=names)
        made = trainer(tmp_path, validation, model=model, **settings)
        made.train(resume_from_checkpoint=resume)
        return [
            [entry[f"eval_target_{name}"] for name in names]
            for entry in made.state.log_history
            if "eval_target_ensv" in entry
        ]

    whole = run()
    ensemble = [each[0] for each in whole]
    assert len(whole) == 4 and ensemble[0] == 1.0 and min(ensemble) < 1.0
    assert len({each[1] for each in whole}) > 1
    assert run(str(tmp_path / "checkpoint-2")) == whole


def test_without_labels_in_the_evaluated_rows_the_source_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, LabelFreeValidation(target()))
    made.eval_dataset = DEV.remove_columns("labels")
    found = values(made.evaluate())
    assert "eval_target_entropy" in found and "eval_target_iwv" not in found
    assert "have no labels, so there is no iwv, dev, circular" in caplog.text


def test_untrusted_weights_are_never_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = bert(seed=4)
    embeddings = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        embeddings[5:20] -= 30 * torch.randn(16)
        embeddings[40:] += 30 * torch.randn(16)
    made = trainer(tmp_path, LabelFreeValidation(rows(37, 2, None, low=40)), model=model)
    made.eval_dataset = rows(34, 3, "row", high=20)
    found = values(made.evaluate())
    assert found["eval_target_iwv"] == found["eval_target_dev"] == -np.inf
    assert "iwv is -inf" in caplog.text and "A-distance" in caplog.text


def test_a_collapsed_model_is_flagged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = bert(seed=4)
    model.classifier.bias.data[1] = 50
    found = values(trainer(tmp_path, LabelFreeValidation(target()), model=model).evaluate())
    assert found["eval_target_collapsed"] == 1
    assert {found[f"eval_target_{name}"] for name in ("entropy", "snd", "class_ami")} == {-np.inf}
    assert "the model has collapsed: every target item is given class 1" in caplog.text


@pytest.mark.parametrize("case", ["token", "image", "lora"])
def test_other_models(case: str, tmp_path: Path) -> None:
    name = "sequence" if case == "lora" else case
    head = CASES[name]
    model = head.model(0)
    if case == "lora":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    made = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=head.data(12),
        eval_dataset=head.data(24),
        data_collator=head.collate,
        callbacks=[AdaptationCallback(LabelFreeValidation(head.data(30)))],
    )
    found = values(made.evaluate())
    assert {f"eval_target_{name}" for name in VALIDATORS} < set(found)
    items = collect_items(made, head.data(30))
    if case == "token":
        real = sum(label != -100 for row in head.data(30)["labels"] for label in row)
        assert len(items.labelled) == real < len(items)
    assert items.features.shape[0] == items.logits.shape[0] == len(items.keys)


def test_sounds(tmp_path: Path) -> None:
    dev = sounds(24, 0.1)
    made = Trainer(
        wav2vec2(),
        arguments(tmp_path),
        eval_dataset=dev.add_column("labels", [i % 2 for i in range(24)]),
        data_collator=sound_collate,
        callbacks=[AdaptationCallback(LabelFreeValidation(sounds(20, 0.2)))],
    )
    assert {f"eval_target_{name}" for name in VALIDATORS} < set(made.evaluate())


@pytest.mark.parametrize("case", ["spans", "masked_lm", "several_labels", "choices"])
def test_other_predictions_are_refused_by_name(case: str, tmp_path: Path) -> None:
    head = CASES[case]
    made = Trainer(
        head.model(0),
        arguments(tmp_path),
        train_dataset=head.data(8),
        eval_dataset=head.data(8),
        data_collator=head.collate,
        callbacks=[AdaptationCallback(LabelFreeValidation(head.data(8)))],
    )
    with pytest.raises(ValueError, match="LabelFreeValidation needs"):
        made.evaluate()


def test_a_model_gone_nan_is_never_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = bert(seed=4)
    model.classifier.weight.data[:] = torch.nan
    found = values(trainer(tmp_path, LabelFreeValidation(target()), model=model).evaluate())
    assert {*found.values()} == {-np.inf} and "NaN or infinite" in caplog.text


@pytest.mark.parametrize(("dev", "others"), [(34, 1), (34, 3), (2, 37), (1, 1)])
def test_a_few_rows_are_no_error(dev: int, others: int, tmp_path: Path) -> None:
    made = trainer(tmp_path, LabelFreeValidation(target().select(range(others))))
    made.eval_dataset = DEV.select(range(dev))
    found = values(made.evaluate())
    assert found["eval_target_iwv"] == -np.inf and np.isfinite(found["eval_target_entropy"])
    with pytest.raises(ValueError, match="the data set is empty"):
        trainer(tmp_path, LabelFreeValidation(target().select([]))).evaluate()


def test_a_collator_that_needs_labels_sees_others(tmp_path: Path) -> None:
    seen: list[Any] = []

    def strict(features: Any) -> Any:
        seen.extend(row["labels"] for row in features)
        return collate(features)

    texts = target().add_column("labels", ["a word"] * 37)
    expected = values(trainer(tmp_path, LabelFreeValidation(target())).evaluate())
    made = trainer(tmp_path, LabelFreeValidation(texts))
    assert values(made.evaluate()) == expected
    made.data_collator = strict
    assert values(made.evaluate()) == expected and "a word" not in seen


def test_the_first_checkpoint_is_not_chosen_for_agreeing_with_itself(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, LabelFreeValidation(target()), metric_for_best_model="eval_target_ensv"
    )
    with pytest.raises(ValueError, match="the first evaluation agrees with itself"):
        made.evaluate()


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_run_without_evaluations_says_so(
    strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, LabelFreeValidation(target()), eval_strategy=strategy, max_steps=1).train()
    assert ("this run makes none" in caplog.text) == (strategy == "no")


def test_rows_are_limited_before_they_are_run(tmp_path: Path) -> None:
    made, rows_run = trainer(tmp_path, LabelFreeValidation(target(), max_items=5)), []
    made.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows_run.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    made.evaluate()
    assert sum(rows_run) == len(DEV) + 5


def test_predict_is_left_alone(tmp_path: Path) -> None:
    made = trainer(tmp_path, LabelFreeValidation(target()))
    assert not values(made.predict(DEV).metrics)
    assert not values(made.predict(DEV, metric_key_prefix="eval").metrics)


def test_training_goes_on_as_without_it(tmp_path: Path) -> None:
    one, other = trainer(tmp_path), trainer(tmp_path, LabelFreeValidation(target()))
    one.train(), other.train()
    assert same_bits(weights(one.model), weights(other.model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelFreeValidation(validators=["ivw"]), r"\['ivw'\] are unknown: use entropy"),
        (lambda: LabelFreeValidation(max_items=1), "max_items=1 must be at least 2"),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target"):
        trainer(tmp_path, LabelFreeValidation()).evaluate()


def test_many_items_are_thinned_out_evenly(tmp_path: Path) -> None:
    model = bert(seed=4)
    whole = values(trainer(tmp_path, LabelFreeValidation(target()), model=model).evaluate())
    made = trainer(tmp_path, LabelFreeValidation(target(), max_items=20), model=copy.copy(model))
    some = values(made.evaluate())
    assert some["eval_target_entropy"] != whole["eval_target_entropy"]
    assert some["eval_target_entropy"] == pytest.approx(whole["eval_target_entropy"], rel=0.2)
