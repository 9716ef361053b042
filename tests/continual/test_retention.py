"""Keeping predictions: against a second model, with adapters, old classes, language models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
)

from hf_adapt import adapt
from hf_adapt.continual import KeepPredictions, Replay, ReplayMemory
from tests.helpers.data import collate, rows
from tests.helpers.libraries import SFT_DATA, sft
from tests.helpers.models import bert, llama
from tests.helpers.trainers import GradientRecorder, arguments, cosine_and_ratio, same_bits, weights


def trainer_in(folder: Path, model: Any, train: Any = None, **settings: Any) -> Trainer:
    settings = {"max_grad_norm": 0, "per_device_train_batch_size": 8, "max_steps": 2, **settings}
    return Trainer(
        model,
        arguments(folder, **settings),
        train_dataset=rows(16, 1) if train is None else train,
        eval_dataset=rows(8, 3),
        data_collator=collate,
    )


def batch_norm_classifier() -> ResNetForImageClassification:
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=2
        )
    )


def gradients(trainer: Trainer, *adaptations: Any) -> list[torch.Tensor]:
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    adapt(trainer, *adaptations).train()
    return recorder.gradients


def divergence(start: Any, model: Any, batch: Any, temperature: float = 1.0) -> torch.Tensor:
    """The mean KL divergence from a second model's predictions, times the squared temperature."""
    given = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        theirs = (start.eval()(**given).logits / temperature).log_softmax(-1)
    own = (model(**given).logits / temperature).log_softmax(-1)
    kl = F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1)
    return kl.mean() * temperature**2


def flat(model: Any, loss: torch.Tensor) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).double().flatten()
            for p, g in zip(trained, found, strict=True)
        ]
    )


def adapters(model: Any, trained: bool = False) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=not trained)
    return get_peft_model(model, config)


@pytest.mark.parametrize("kind", ["full", "frozen", "adapters", "trained adapters"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_second_step_is_that_of_a_second_model(
    kind: str, temperature: float, tmp_path: Path
) -> None:
    """After the first step the model has moved and the starting one has not."""
    model, data = bert(), rows(8, 1)
    if kind == "frozen":
        model.bert.embeddings.requires_grad_(False)
    elif kind != "full":
        model = adapters(model, kind == "trained adapters")
    start = copy.deepcopy(model)
    moved = copy.deepcopy(model)
    trainer = trainer_in(tmp_path, moved, data, learning_rate=0.05, lr_scheduler_type="constant")
    keep = KeepPredictions(0.7, temperature=temperature)
    _, second = gradients(trainer, keep)

    by_hand = trainer_in(tmp_path, model, data, learning_rate=0.05, lr_scheduler_type="constant")
    by_hand.args.max_steps = 1
    by_hand.train()  # the divergence has no gradient in the first step
    model.train()
    batch = collate(list(data))
    wanted = flat(model, model(**batch).loss + 0.7 * divergence(start, model, batch, temperature))
    assert cosine_and_ratio(second, wanted) == pytest.approx((1.0, 1.0), abs=1e-4)
    logs = [entry for entry in trainer.state.log_history if "loss/keep_predictions" in entry]
    assert logs[0]["loss/keep_predictions"] == pytest.approx(0, abs=1e-6)
    assert logs[1]["loss/keep_predictions"] > 1e-4
    key = "keep_predictions/kl_to_start"
    assert (logs[1].get(key) == logs[1]["loss/keep_predictions"]) == (temperature == 1)


def test_the_starting_model_is_that_with_its_adapters_off(tmp_path: Path) -> None:
    model, batch = adapters(bert()), collate(list(rows(8, 1)))
    keep, seen = KeepPredictions(), []
    trainer = trainer_in(tmp_path, model, learning_rate=0.05)
    original = keep.teacher_forward

    def teacher_forward(teacher: Any, inputs: Any) -> Any:
        given = {k: v for k, v in batch.items() if k != "labels"}
        seen.append(original(teacher, given).logits)
        with torch.no_grad(), model.disable_adapter():
            seen.append(model.eval()(**given).logits)
        model.train()
        return original(teacher, inputs)

    keep.teacher_forward = teacher_forward
    adapt(trainer, keep).train()
    torch.testing.assert_close(seen[-2], seen[-1])
    assert len(keep.teachers[0]._start) == sum(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert not torch.allclose(model.eval()(**batch).logits, seen[-1])


def test_weight_zero_is_the_plain_trainer(tmp_path: Path) -> None:
    finals = []
    for adaptations in ([], [KeepPredictions(0.0)]):
        trainer = trainer_in(tmp_path, bert(dropout=True))
        (adapt(trainer, *adaptations) if adaptations else trainer).train()
        finals.append(weights(trainer.model))
    assert same_bits(*finals)


# ---- which rows, which classes ----


def test_rows_of_the_memory_alone(tmp_path: Path) -> None:
    model, new, old = bert(), rows(8, 1), rows(8, 2, low=30)
    start = bert(seed=5)
    keep = KeepPredictions(0.5, on="replay", start=start)
    trainer = trainer_in(tmp_path, model, new, max_steps=1)
    (first,) = gradients(trainer, Replay(old, ratio=1.0, weight=0.3), keep)
    model, batches = bert(), [collate(list(each)) for each in (new, old)]
    losses = [model(**batch).loss for batch in batches]
    term = divergence(start, model, batches[1])
    wanted = flat(model, losses[0] + 0.3 * losses[1] + 0.5 * term)
    assert cosine_and_ratio(first, wanted) == pytest.approx((1.0, 1.0), abs=1e-5)


@pytest.mark.parametrize("given", ["start", "names", "numbers"])
def test_old_classes_of_a_head_that_has_grown(given: str, tmp_path: Path) -> None:
    """The start has two of the three classes, or has all and two are named."""
    names = {0: "ham", 1: "bad", 2: "good"}
    model = bert(id2label=names, label2id={v: k for k, v in names.items()})
    if given == "start":
        start: Any = bert(num_labels=2, id2label={0: "good", 1: "bad"}, seed=4)
        options: dict[str, Any] = {"start": start}
        chosen, theirs = [2, 1], [0, 1]
    else:
        start = bert(seed=4, id2label=names)
        chosen = theirs = [1, 2]
        options = {"start": start, "classes": ["bad", "good"] if given == "names" else [1, 2]}
    data = rows(8, 1)
    trainer = trainer_in(tmp_path, copy.deepcopy(model), data, max_steps=1)
    (first,) = gradients(trainer, KeepPredictions(0.5, **options))
    batch = collate(list(data))
    with torch.no_grad():
        old = start.eval()(batch["input_ids"], batch["attention_mask"]).logits[:, theirs]
    model.train()
    outputs = model(**batch)
    own = outputs.logits[:, chosen].log_softmax(-1)
    term = F.kl_div(own, old.log_softmax(-1), reduction="batchmean", log_target=True)
    wanted = flat(model, outputs.loss + 0.5 * term)
    assert cosine_and_ratio(first, wanted) == pytest.approx((1.0, 1.0), abs=1e-5)


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_language_models_do_without_whole_logits(kind: str, tmp_path: Path) -> None:
    """Tied to the embeddings, the projection trains: the start's own is to be used."""
    found = []
    for chunked in (False, True):
        model = llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        if kind == "adapters":
            torch.manual_seed(3)
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
        trainer = trainer_in(tmp_path, model, rows(16, 1, "lm"), learning_rate=0.05, max_steps=3)
        trainer.args.gradient_accumulation_steps = 2
        keep = KeepPredictions(0.7, chunked=chunked)
        found.append(gradients(trainer, keep)[-1])
        assert trainer.state.log_history[-2]["keep_predictions/kl_to_start"] > 1e-3
    assert cosine_and_ratio(*found) == pytest.approx((1.0, 1.0), abs=1e-4)


def test_evaluations_compare_with_the_start(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, bert(), learning_rate=0.05, eval_strategy="steps", eval_steps=1)
    adapt(trainer, KeepPredictions(0.5, evaluate=True))
    assert trainer.evaluate()["eval_teacher_kl"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    found = [e["eval_teacher_kl"] for e in trainer.state.log_history if "eval_teacher_kl" in e]
    assert found[1] > found[0] > 1e-4
    after = trainer.evaluate()["eval_teacher_kl"]
    assert after == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["text", "completion"])
def test_supervised_fine_tuning_with_some_general_text(
    name: str, lora: bool, tmp_path: Path
) -> None:
    """TRL tokenises the memory's raw rows as it does its own."""
    new, general, settings = SFT_DATA[name]
    settings = {**settings, "max_steps": 3, "learning_rate": 2.0 if lora else 0.05}
    trainer = sft(tmp_path, new, lora, **settings)
    memory = ReplayMemory.from_dataset(general, 5)
    adapt(trainer, Replay(memory, ratio=0.5), KeepPredictions(0.5)).train()
    first, *_, last = [e for e in trainer.state.log_history if "loss/replay" in e]
    key = "keep_predictions/kl_to_start"
    assert abs(first[key]) < 1e-5 < last[key]
    for entry in (first, last):
        own = entry["loss/task"] + entry["loss/replay"] + 0.5 * entry[key]
        assert entry["loss"] == pytest.approx(own, rel=1e-3)
    with pytest.raises(ValueError, match="reads tokenised rows"):
        ReplayMemory.from_dataset(general, 5, "surprise", trainer=trainer)


def test_a_regression_is_held_by_its_numbers(tmp_path: Path) -> None:
    model = bert(num_labels=1, problem_type="regression")
    start = bert(num_labels=1, problem_type="regression", seed=4)
    data = rows(8, 1).map(lambda row: {"labels": float(row["labels"])})
    trainer = trainer_in(tmp_path, copy.deepcopy(model), data, max_steps=1)
    (first,) = gradients(trainer, KeepPredictions(0.5, start=start))
    batch = collate(list(data))
    batch["labels"] = batch["labels"].float()
    with torch.no_grad():
        old = start.eval()(batch["input_ids"], batch["attention_mask"]).logits
    outputs = model(**batch)
    wanted = flat(model, outputs.loss + 0.5 * (outputs.logits - old).square().mean())
    assert cosine_and_ratio(first, wanted) == pytest.approx((1.0, 1.0), abs=1e-5)


def test_the_start_has_the_statistics_of_batch_norm_that_it_had(tmp_path: Path) -> None:
    model = batch_norm_classifier()
    given = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = model.eval()(pixel_values=given).logits.detach()
    images = [{"pixel_values": torch.randn(3, 8, 8) + 3, "labels": i % 2} for i in range(16)]
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=4, learning_rate=0.05), train_dataset=images
    )
    keep, seen = KeepPredictions(), []
    original = keep.teacher_forward

    def teacher_forward(teacher: Any, inputs: Any) -> Any:
        seen.append(original(teacher, {"pixel_values": given}).logits)
        return original(teacher, inputs)

    keep.teacher_forward = teacher_forward
    adapt(trainer, keep).train()
    torch.testing.assert_close(seen[-1], before)
    assert not torch.allclose(model.eval()(pixel_values=given).logits, before, atol=0.1)


# ---- resume ----


def test_a_checkpoint_without_the_start_is_refused(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    adapt(trainer_in(tmp_path, bert(), **settings), KeepPredictions()).train()
    again = adapt(trainer_in(tmp_path, bert()), KeepPredictions())
    with pytest.raises(ValueError, match="does not hold the weights that training started from"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    start = bert()
    start.save_pretrained(tmp_path / "start")
    given = adapt(trainer_in(tmp_path, bert()), KeepPredictions(start=str(tmp_path / "start")))
    given.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert given.state.global_step == 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["good"]}, "needs at least two old classes"),
        ({"classes": ["LABEL_0", "good"]}, "'good' is none of the model's 3"),
        ({"classes": [0, 7]}, "7 is none of the model's 3"),
        ({"on": "replay"}, "needs the stream 'replay'"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"weight": -1.0}, "the weight must be a finite number"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(trainer_in(tmp_path, bert()), KeepPredictions(**options)).train()


def test_a_saved_model_is_plain(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, bert(), save_strategy="steps", save_steps=2)
    adapt(trainer, KeepPredictions()).train()
    saved, info = BertForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-2", output_loading_info=True
    )
    assert not any(info.values()) and same_bits(weights(saved), weights(trainer.model))
