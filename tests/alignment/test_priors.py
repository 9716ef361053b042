"""Class frequencies: intervals, estimates against independent formulas, what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from transformers import BertForMultipleChoice, Trainer

from hf_adapt import MMD, AdaptationCallback, InformationMaximization, Stream, adapt
from hf_adapt.alignment import (
    PriorCorrection,
    SelfTraining,
    corrected_logits,
    estimate_priors,
    priors,
    priors_from_sample,
)
from hf_adapt.alignment.prior_correction import head_bias
from hf_adapt.alignment.priors import resolved_priors
from tests.helpers.data import collate, rows
from tests.helpers.models import bert, bert_config
from tests.helpers.trainers import arguments

NAMES = {0: "ham", 1: "spam", 2: "other"}


def test_an_interval_is_wilsons() -> None:
    """Its bounds are where the true frequency is z standard errors of its own from the sample's."""
    sample = priors_from_sample([0] * 40 + [1] * 10, num_classes=3)
    assert sample.priors.tolist() == pytest.approx([0.8, 0.2, 0.0])
    z, n, p = 1.959964, 50, 0.2
    bounds = sorted(np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p]).real)
    assert [sample.lower[1].item(), sample.upper[1].item()] == pytest.approx(bounds, abs=1e-5)
    assert (
        float(sample.lower[2]) == pytest.approx(0, abs=1e-9)
        and 0.05 < float(sample.upper[2]) < 0.08
    )


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = [priors_from_sample(generator.random(50) < 0.13, 2) for _ in range(400)]
    hits = [float(s.lower[1]) <= 0.13 <= float(s.upper[1]) for s in draws]
    assert 0.92 < np.mean(hits) < 0.99


@pytest.mark.parametrize("labels", [[], [0, 1, 5], [-1, 0]])
def test_labels_that_are_none_are_refused(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="at least one label, each an integer from 0 to"):
        priors_from_sample(labels, num_classes=3)


@pytest.mark.parametrize("labels", [[0.5, 1.0], ["ham", "spam"]])
def test_labels_that_are_no_numbers_are_refused(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"number of each row's class, got .*label2id"):
        priors_from_sample(labels)


# ---- estimates ----


def label_shift(priors: list[float], seed: int, n: int = 4000) -> tuple[Any, Any]:
    """Three Gaussians on a line whose rows look alike in both domains; only frequencies differ."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, n, p=priors)
    return generator.normal(2.0 * labels, 1.0)[:, None], labels


@pytest.mark.parametrize("method", ["em", "bbse", "rlls"])
def test_estimates_find_the_frequencies_under_label_shift(method: Any) -> None:
    x, y = label_shift([0.4, 0.3, 0.3], 0)
    held_x, held_y = label_shift([0.4, 0.3, 0.3], 1)
    target, truth = label_shift([0.15, 0.15, 0.7], 2)
    model = LogisticRegression().fit(x, y)
    # Overconfident, as a fine-tuned transformer is: EM must calibrate first.
    logits = [3.0 * torch.tensor(model.decision_function(z)) for z in (held_x, target)]
    found = estimate_priors(logits[0], torch.tensor(held_y), logits[1], method)
    assert found.sum().item() == pytest.approx(1, abs=1e-6)
    wanted = np.bincount(truth) / len(truth)
    assert np.abs(found.numpy() - wanted).max() < 0.05
    source_only = np.bincount(held_y) / len(held_y)
    assert np.abs(source_only - wanted).max() > 0.35


def test_bbse_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    source, target = (
        torch.randn(60, 3, generator=generator),
        torch.randn(50, 3, generator=generator),
    )
    labels = torch.randint(0, 3, (60,), generator=generator)
    source[torch.arange(60), labels] += 2
    confusion = np.zeros((3, 3))
    for i, j in zip(source.argmax(1).tolist(), labels.tolist(), strict=True):
        confusion[i, j] += 1 / 60
    mean = np.bincount(target.argmax(1), minlength=3) / 50
    weights = np.clip(np.linalg.solve(confusion, mean), 0, None)
    wanted = weights * np.bincount(labels, minlength=3) / 60
    found = estimate_priors(source, labels, target, "bbse")
    assert found.numpy() == pytest.approx(wanted / wanted.sum(), abs=1e-5)


def test_estimates_refuse() -> None:
    logits, labels = torch.eye(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"source rows \[2, 0\] by class"):
        estimate_priors(logits, torch.tensor([0, 0]), logits)
    with pytest.raises(ValueError, match=r"got \(2, 2\), \(3,\) and \(2, 2\)"):
        estimate_priors(logits, torch.tensor([0, 1, 1]), logits)
    with pytest.raises(ValueError, match="not finite"):
        estimate_priors(logits, labels, logits * float("nan"))
    with pytest.raises(ValueError, match="'mlls' is unknown: use 'em', 'bbse' or 'rlls'"):
        estimate_priors(logits, labels, logits, "mlls")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 target rows"):
        estimate_priors(logits, labels, logits[:0])


def test_corrected_predictions_follow_bayes() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1]])
    source, target = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])
    wanted = p * target / source
    found = corrected_logits(p.log(), source, target).softmax(1)
    torch.testing.assert_close(found, wanted / wanted.sum())


# ---- what a user gives ----


def test_frequencies_by_name_number_and_order() -> None:
    for given in (
        {"spam": 0.2, "other": 0.1, "ham": 0.7},
        {2: 0.1, 0: 0.7, 1: 0.2},
        (0.7, 0.2, 0.1),
    ):
        assert resolved_priors(given, NAMES).tolist() == pytest.approx([0.7, 0.2, 0.1])
    series = pd.Series([2, 2, 2, 0, 2, 1, 0, 2, 2, 2]).value_counts(normalize=True)
    assert resolved_priors(series, NAMES).tolist() == pytest.approx([0.2, 0.1, 0.7])
    assert resolved_priors("uniform", NAMES).tolist() == pytest.approx([1 / 3] * 3)
    assert resolved_priors([1.0, 0, 0], NAMES).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ham": 0.5, "spam": 0.5}, "names the classes 'ham', 'spam'; the model has 'ham', 'spam'"),
        ({"ham": 0.5, "spam": 0.3, "eggs": 0.2}, "'eggs'; the model has 'ham', 'spam', 'other'"),
        ([0.5, 0.5], "expected 3 numbers of 0 or more"),
        ([0.5, 0.7, -0.2], "expected 3 numbers of 0 or more"),
        ([0.5, 0.4, 0.2], r"add up to 1\.1; frequencies add up to 1"),
        ([13, 80, 7], r"add up to 100; .* divide percentages by 100"),
        ([0.5, float("nan"), 0.5], "expected 3 numbers of 0 or more"),
        (
            "source-like",
            "'source-like' is unknown: use 'uniform', 'predicted', 'source', 'estimate'",
        ),
    ],
)
def test_frequencies_that_are_none_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved_priors(given, NAMES)


def trainer(folder: Path, **settings: Any) -> Trainer:
    return Trainer(
        bert(), arguments(folder, **settings), train_dataset=rows(16, 1), data_collator=collate
    )


@pytest.mark.parametrize("way", ["callback", "adapt", "stream"])
def test_one_option_is_read_by_every_method_that_uses_it(way: str, tmp_path: Path) -> None:
    methods, target = (SelfTraining(), InformationMaximization()), rows(12, 2, None)
    run, priors = trainer(tmp_path), [0.5, 0.3, 0.2]
    if way == "callback":
        run.add_callback(AdaptationCallback(*methods, target_dataset=target, target_priors=priors))
    elif way == "adapt":
        adapt(run, *methods, target_dataset=target, target_priors=priors)
    else:
        adapt(run, *methods, target_dataset=Stream(target, priors=priors))
    run.train()
    assert "information_maximization/divergence" in run.state.log_history[0]
    for method in methods:
        assert method.state_dict()["priors"].tolist() == pytest.approx(priors)


def test_frequencies_given_twice_or_wrongly_are_refused_before_training(tmp_path: Path) -> None:
    target = Stream(rows(12, 2, None), priors="uniform")
    with pytest.raises(ValueError, match="class frequencies are given twice"):
        AdaptationCallback(SelfTraining(), target_dataset=target, target_priors="source")
    run = adapt(
        trainer(tmp_path),
        SelfTraining(),
        target_dataset=rows(12, 2, None),
        target_priors=[0.5, 0.5],
    )
    with pytest.raises(ValueError, match="expected 3 numbers"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("method", [SelfTraining, InformationMaximization])
def test_the_places_of_a_multiple_choice_have_frequencies_and_no_names(
    method: Any, tmp_path: Path
) -> None:
    """Three answers, where the model's configuration says two classes, as it does by default."""

    data = datasets.Dataset.from_list(
        [{"input_ids": [[5 + i, 6], [7, 8], [9, 9 + i]], "labels": i % 3} for i in range(8)]
    )

    def made(priors: Any) -> Trainer:
        run = Trainer(BertForMultipleChoice(bert_config()), arguments(tmp_path), train_dataset=data)
        target = data.remove_columns("labels")
        return adapt(run, method(), target_dataset=target, target_priors=priors)

    run = made([0.5, 0.3, 0.2])
    assert run.model.config.num_labels == 2  # type: ignore[union-attr]
    run.train()
    for names in ({"LABEL_0": 0.5, "LABEL_1": 0.5}, {0: 0.5, 1: 0.3, 2: 0.2}):
        with pytest.raises(ValueError, match=r"which have no names\. Give an array"):
            made(names).train()
    with pytest.raises(ValueError, match=r"expected 3 numbers .* of the classes '0', '1', '2'"):
        made([0.5, 0.5]).train()
    method = PriorCorrection  # whose head has one bias for all places
    with pytest.raises(ValueError, match=r"PriorCorrection needs a head .* BertForMultipleChoice"):
        made([0.5, 0.3, 0.2]).train()


def test_the_sources_own_frequencies_are_counted(tmp_path: Path) -> None:
    method = SelfTraining(prior="source")
    run = adapt(trainer(tmp_path), method, target_dataset=rows(12, 2, None))
    run.train()
    counts = np.bincount([row["labels"] for row in rows(16, 1)], minlength=3)
    assert method.state_dict()["priors"].numpy() == pytest.approx(counts / 16)


@pytest.mark.parametrize(
    ("names", "method", "number"),
    [
        ("ab", lambda name: InformationMaximization(prior="source", name=name), 0),
        ("a", lambda name: InformationMaximization(prior="estimate", name=name), 8),
        ("ab", lambda name: InformationMaximization(prior="estimate", name=name), 8),
        ("a", lambda name: SelfTraining(prior="source", refreshes=(0.5,), name=name), 1),
        ("ab", lambda name: SelfTraining(prior="estimate", refreshes=(0.5,), name=name), 3),
        ("a", lambda name: PriorCorrection(prior=(0.6, 0.3, 0.1), name=name), 0),
    ],
)
def test_the_model_runs_no_more_than_it_must(
    names: str, method: Any, number: int, tmp_path: Path
) -> None:
    """Labels are counted without it; estimates read both domains once a step for all methods."""

    def forwards(*methods: Any) -> int:
        """In evaluation mode; the first batch is looked at in it as well."""
        run, modes = trainer(tmp_path, max_steps=5, per_device_eval_batch_size=16), []
        run.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
        adapt(run, *methods, target_dataset=rows(12, 2, None)).train()
        return modes.count(False)

    methods = [method(name) for name in names]
    assert forwards(*methods) - forwards(MMD()) == number
    for one in methods[1:]:
        assert torch.equal(one.state_dict()["priors"], methods[0].state_dict()["priors"])


def test_an_average_is_compared_with_its_own_predictions_for_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, found = SelfTraining(refreshes=(0.8,), teacher_decay=0.9, prior="estimate"), []
    run = trainer(tmp_path, max_steps=5, learning_rate=0.1)

    def noted(logits: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        weights = {name: value.clone() for name, value in method.average.weights.items()}  # type: ignore[union-attr]
        found.append((logits, weights))
        return estimate_priors(logits, *rest)

    monkeypatch.setattr(priors, "estimate_priors", noted)
    adapt(run, method, target_dataset=rows(12, 2, None)).train()
    ((logits, weights),) = found
    batch = collate(list(rows(16, 1)))
    with torch.no_grad():
        wanted = torch.func.functional_call(run.model.eval(), weights, (), batch).logits
    torch.testing.assert_close(logits.sort(0).values, wanted.sort(0).values, atol=1e-5, rtol=1e-4)


def test_without_frequencies_half_of_what_the_model_predicts_is_believed(tmp_path: Path) -> None:
    method = SelfTraining(refreshes=(0.0,))
    run = adapt(trainer(tmp_path, learning_rate=0.0), method, target_dataset=rows(12, 2, None))
    run.train()
    batch = collate(list(rows(12, 2, None)))
    with torch.no_grad():
        mean = run.model.eval()(**batch).logits.softmax(1).mean(0)
    torch.testing.assert_close(method.state_dict()["priors"], (mean + 1 / 3) / 2)


def test_frequencies_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    adapt(run, MMD(), target_dataset=rows(12, 2, None), target_priors=[0.5, 0.3, 0.2])
    with pytest.raises(ValueError, match="no adaptation of the run uses them"):
        run.train()


def test_frequencies_may_come_with_another_callback_than_the_rows(tmp_path: Path) -> None:
    run, method = trainer(tmp_path), SelfTraining()
    run.add_callback(AdaptationCallback(MMD(), target_dataset=rows(12, 2, None)))
    run.add_callback(AdaptationCallback(method, target_priors=[0.5, 0.3, 0.2]))
    run.train()
    assert method.state_dict()["priors"].tolist() == pytest.approx([0.5, 0.3, 0.2])


@pytest.mark.parametrize("method", [PriorCorrection, lambda: SelfTraining(prior="estimate")])
def test_a_class_without_source_rows_is_told_at_the_first_step(method: Any, tmp_path: Path) -> None:
    source = rows(16, 1).map(lambda row: {"labels": row["labels"] % 2})
    run = Trainer(bert(), arguments(tmp_path), train_dataset=source, data_collator=collate)
    adapt(run, method(), target_dataset=rows(12, 2, None))
    with pytest.raises(ValueError, match="source rows of each class"):
        run.train()
    assert run.state.global_step == 0


# ---- correction ----


def test_correction_weights_the_source_and_moves_the_bias(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, learning_rate=0.0, per_device_train_batch_size=16)
    before = run.model.classifier.bias.detach().clone()  # type: ignore[union-attr]
    priors = torch.tensor([0.6, 0.3, 0.1])
    method = PriorCorrection(prior=priors)
    adapt(run, method, target_dataset=rows(12, 2, None)).train()
    after = run.model.classifier.bias.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(after - before, (3 * priors).log())
    labels = torch.tensor([row["labels"] for row in rows(16, 1)])
    batch = collate(list(rows(16, 1)))
    with torch.no_grad():
        run.model.classifier.bias.copy_(before)  # type: ignore[union-attr]
        logits = run.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    balanced = torch.nn.functional.cross_entropy(
        logits, labels, weight=16 / (3 * torch.bincount(labels, minlength=3)), reduction="none"
    ).mean()
    assert run.state.log_history[0]["loss"] == pytest.approx(balanced.item(), abs=1e-4)


def test_a_model_that_is_trained_again_is_corrected_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, learning_rate=0.0)
    adapt(run, PriorCorrection(prior=(0.6, 0.3, 0.1)), target_dataset=rows(12, 2, None))
    found = []
    for _ in range(2):
        run.train()
        found.append(run.model.classifier.bias.detach().clone())  # type: ignore[union-attr]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("prior", [(0.8, 0.1, 0.1), None])
@pytest.mark.parametrize("start", [2, 4])
def test_a_run_that_resumes_is_corrected_as_the_whole_one(
    start: int, prior: Any, tmp_path: Path
) -> None:
    """In the same Trainer, and where no step is left and no batch is seen."""
    run = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    adapt(run, PriorCorrection(prior=prior), target_dataset=rows(12, 2, None))
    run.train()
    whole = run.model.classifier.bias.detach().clone()  # type: ignore[union-attr]
    fresh = trainer(tmp_path, max_steps=4, save_strategy="no")
    adapt(fresh, PriorCorrection(prior=prior), target_dataset=rows(12, 2, None))
    for each in (run, fresh):
        each.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}"))
        assert torch.equal(each.model.classifier.bias, whole)  # type: ignore[union-attr]


def test_a_head_that_adapters_do_not_save_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"]))
    run = Trainer(model, arguments(tmp_path), train_dataset=rows(8, 1), data_collator=collate)
    adapt(run, PriorCorrection(), target_dataset=rows(8, 2, None))
    with pytest.raises(ValueError, match="modules_to_save"):
        run.train()


def test_a_head_without_a_bias_is_refused() -> None:
    model = torch.nn.Linear(4, 3, bias=False)
    model.config = SimpleNamespace(num_labels=3)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"last layer.*has none"):
        head_bias(model)
