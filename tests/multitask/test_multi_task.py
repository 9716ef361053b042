"""Several tasks in one training: exact beside a hand-written loop, however the rows are cut."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
    TrainerCallback,
)

from hf_adapt import AdaptationTrainer, Distillation, adapt
from hf_adapt.alignment import FGM, VAT, RDrop
from hf_adapt.continual import KeepPredictions, Replay
from hf_adapt.multitask import (
    FAMO,
    DynamicWeightAverage,
    GradNorm,
    InverseLogClasses,
    MultiTask,
    RandomWeights,
    TaskSpec,
    Uncertainty,
    cagrad,
    imtl_g,
    mgda,
    mix,
    nash_mtl,
    pcgrad,
)
from hf_adapt.multitask.task_gradients import TaskGradients
from tests.helpers import injectors, toy
from tests.helpers.data import collate, rows
from tests.helpers.injectors import injection
from tests.helpers.models import bert, llama, t5_config
from tests.helpers.trainers import ScaledTrainer, arguments

TOPIC, SPAM = TaskSpec(), TaskSpec(num_labels=2)
TAGS = TaskSpec("tags", 4, head="token_classification", collator=collate)
SPECS = {"topic": TOPIC, "tags": TAGS, "spam": SPAM}


def with_labels(number: int, seed: int, labels: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Rows whose label is made of their tokens."""
    made = []
    for row in rows(number, seed, None):
        made.append({**row, **labels(row)})
    return datasets.Dataset.from_list(made)


def spam(number: int, seed: int = 3) -> Any:
    """Rows of two classes."""
    return with_labels(number, seed, lambda row: {"labels": row["input_ids"][0] % 2})


def tags(number: int, seed: int = 2, column: str = "tags") -> Any:
    """Rows with one of four tags for each token, some without."""
    return rows(number, seed, "token").rename_column("labels", column)


def data(sizes: tuple[int, int, int] = (8, 8, 8), **options: Any) -> Any:
    """Rows of three tasks: three classes, four tags, two classes."""
    topic = rows(sizes[0], 1, "row")
    return mix({"topic": topic, "tags": tags(sizes[1]), "spam": spam(sizes[2])}, **options)


class Gradients(TrainerCallback):
    """Keeps the gradients of the model and of the heads in each step."""

    def __init__(self, method: MultiTask) -> None:
        self.method = method
        self.found: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = dict(kwargs["model"].named_parameters())
        if self.method.module is not None:
            named.update({f"own.{n}": p for n, p in self.method.module.named_parameters()})
        self.found.append(
            {n: p.grad.detach().clone() for n, p in named.items() if p.grad is not None}
        )


def make(
    folder: Path,
    method: MultiTask,
    train: Any,
    model: Any = None,
    evaluation: Any = None,
    **settings: Any,
) -> AdaptationTrainer:
    return AdaptationTrainer(
        model=bert() if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collate,
        objectives=method,
    )


def gradients(
    folder: Path, method: MultiTask, train: Any, model: Any = None, **settings: Any
) -> tuple[AdaptationTrainer, list[dict[str, torch.Tensor]]]:
    """Those of steps that move nothing, without clipping."""
    settings = {"max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 0.0, **settings}
    trainer, seen = make(folder, method, train, model, **settings), Gradients(method)
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.found


def losses_by_hand(method: MultiTask, model: nn.Module, train: Any) -> dict[str, torch.Tensor]:
    """The mean loss of each task over all its rows."""
    found = {}
    for task in method.tasks:
        own = [dict(row) for row in train if row["task"] == task]
        for row in own:
            del row["task"]
            row.update({"labels": row.pop("tags")} if "tags" in row else {})
        head = method.models[task].model if task in method.models else model
        head.eval()
        found[task] = head(**_batch(own)).loss
    return found


def _batch(own: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Labels that are one for each row, or a vector; else padded.

    To one length: a span's loss is over its padding too.
    """
    is_padded = isinstance(own[0].get("labels"), list) and isinstance(own[0]["labels"][0], int)
    kept = ["input_ids", "attention_mask", *(["labels"] if is_padded else [])]
    others = own[0].keys() - {*kept}
    batch = collate([{k: row[k] for k in kept} for row in own], length=12)
    return {**batch, **{k: torch.tensor([row[k] for row in own]) for k in others}}


def parameters(method: MultiTask, model: nn.Module) -> dict[str, nn.Parameter]:
    assert method.module is not None or not method.models
    own = {} if method.module is None else dict(method.module.named_parameters())
    return {**dict(model.named_parameters()), **{f"own.{n}": p for n, p in own.items()}}


def gradient_by_hand(method: MultiTask, model: nn.Module, loss: torch.Tensor) -> Any:
    named = parameters(method, model)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def assert_close(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


CUTS = [(24, 1), (8, 3), (1, 24), (5, 5)]


@pytest.mark.parametrize("size, steps", CUTS)
def test_the_gradient_is_that_of_all_rows(tmp_path: Path, size: int, steps: int) -> None:
    """Of ragged micro-batches too, and of some without rows of a task."""
    train, method = data(), MultiTask(SPECS)
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    trainer, (found,) = gradients(tmp_path, method, train, **cut)
    losses = losses_by_hand(method, trainer.model, train)
    assert_close(gradient_by_hand(method, trainer.model, sum(losses.values())), found)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    for task, loss in losses.items():
        name = "loss/task" if task == "topic" else f"multitask/{task}"
        assert entry[name] == pytest.approx(loss.item(), rel=1e-4)


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": row["input_ids"][0] / 50}


def several(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [float(row["input_ids"][0] % 2), float(row["input_ids"][1] % 2)]}


def span(row: dict[str, Any]) -> dict[str, Any]:
    return {"start_positions": row["input_ids"][0] % 4, "end_positions": 3}


def next_tokens(row: dict[str, Any]) -> dict[str, Any]:
    """The first one is never predicted, though transformers 4 counts its label."""
    return {"labels": [-100, *row["input_ids"][1:]]}


def target_text(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [*row["input_ids"][:2], 1]}


def t5() -> Any:
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(t5_config())


HEADS: dict[str, tuple[Callable[[], Any], Any, TaskSpec, Any]] = {
    "regression": (
        bert, rows(9, 1, "row"),
        TaskSpec(num_labels=1, problem_type="regression"), with_labels(11, 4, numbers),
    ),
    "several labels": (
        bert, rows(9, 1, "row"),
        TaskSpec(num_labels=2, problem_type="multi_label_classification", collator=_batch),
        with_labels(11, 4, several),
    ),
    "question answering": (
        bert, rows(9, 1, "row"),
        TaskSpec(head="question_answering", collator=_batch), with_labels(11, 4, span),
    ),
    "own task of regression": (
        lambda: bert(num_labels=1, problem_type="regression"), with_labels(9, 4, numbers),
        SPAM, spam(11),
    ),
    "classes on a language model": (
        llama, with_labels(9, 1, next_tokens),
        TaskSpec(num_labels=2, head="sequence_classification", collator=collate), spam(11),
    ),
    "two texts of one model": (
        llama, with_labels(9, 1, next_tokens), TaskSpec(), with_labels(11, 2, next_tokens),
    ),
    "text to text": (
        t5, with_labels(9, 1, target_text), TaskSpec(), with_labels(11, 2, target_text),
    ),
    "labelled rows of another domain": (
        bert, rows(9, 1, "row"), TaskSpec(head="shared"), rows(11, 2, "row", low=30),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_every_kind(kind: str, tmp_path: Path) -> None:
    """In micro-batches of which some lack one of the two tasks."""
    model, own, spec, others = HEADS[kind]
    train, method = mix({"own": own, "other": others}), MultiTask({"own": None, "other": spec})
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 20}
    trainer, (found,) = gradients(tmp_path, method, train, model(), **cut)
    losses = losses_by_hand(method, trainer.model, train)
    expected = gradient_by_hand(method, trainer.model, losses["own"] + losses["other"])
    assert_close(expected, found)


def test_every_head_runs_in_the_mixed_precision_of_the_run(tmp_path: Path) -> None:
    """In training and in an evaluation, with outputs in float32, as accelerate has them."""
    trainer = make(tmp_path, method := MultiTask(SPECS), data(), bf16=True, max_steps=1)
    heads = {"topic": trainer.model.classifier}
    seen: dict[str, list[torch.dtype]] = {}

    def watch(task: str, module: nn.Module) -> None:
        seen[task] = []
        module.register_forward_hook(lambda _, __, out: seen[task].append(out.dtype))

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            heads.update({task: m.model.classifier for task, m in method.models.items()})
            for task, module in heads.items():
                watch(task, module)

    trainer.add_callback(Watch())
    trainer.train()
    trainer.evaluate({"spam": spam(9, 13)})
    assert {task: set(found) for task, found in seen.items()} == {
        task: {torch.bfloat16} for task in SPECS
    }
    assert (
        trainer.predict(spam(3, 14), metric_key_prefix="test_spam").predictions.dtype == "float32"
    )


def test_affinity_is_found_in_full_precision(tmp_path: Path) -> None:
    """Steps that small are lost in the rounding of bf16."""
    found = []
    for bf16 in (False, True):
        method = MultiTask(SPECS, diagnose_every=1)
        trainer = make(tmp_path, method, data(), bf16=bf16, max_steps=1)
        trainer.train()
        assert method.diagnosis is not None
        found.append(method.diagnosis.affinity)
        if bf16:  # and training goes on in bf16
            scores = trainer.model(**_batch([dict(rows(3, 1, "row")[i]) for i in range(3)])).logits
            assert scores.dtype == torch.float32 and hasattr(trainer.model, "_original_forward")
            assert trainer.model.forward != trainer.model._original_forward
    torch.testing.assert_close(*found, rtol=0.1, atol=5e-4)


# ---- weights, surgery ----


def test_weights_by_task_and_schedules(tmp_path: Path) -> None:
    """L = λ_s L_s + λ_t L_t, on labelled rows of a target too."""
    train = mix({"source": rows(9, 1, "row"), "target": rows(7, 2, "row", low=30)})
    method = MultiTask(
        {"source": None, "target": TaskSpec(head="shared")},
        weighting={"source": lambda progress: 1 - progress, "target": 0.3},
    )
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 2}
    trainer, found = gradients(tmp_path, method, train, **cut)
    for step, each in enumerate(found):
        losses = losses_by_hand(method, trainer.model, train)
        total = (1 - step / 2) * losses["source"] + 0.3 * losses["target"]
        assert_close(gradient_by_hand(method, trainer.model, total), each)


@pytest.mark.parametrize("size, steps", CUTS)
def test_uncertainty_is_learnt_from_the_losses_of_the_whole_step(
    size: int, steps: int, tmp_path: Path
) -> None:
    """The model's gradient and that of the log-variances, whose term enters once a step."""
    train, method = data(), MultiTask(SPECS, weighting=Uncertainty(learning_rate=0.1))
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    settings = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.3}
    trainer = make(tmp_path, method, train, **settings, **cut)
    seen = Gradients(method)
    trainer.add_callback(seen)
    start = torch.tensor([0.3, -0.2, 0.1])

    class Begin(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            method.weighting._value.data.copy_(start)

    trainer.add_callback(Begin())
    trainer.train()
    losses = losses_by_hand(method, trainer.model, train)
    s = start.clone().requires_grad_()
    total = sum(torch.exp(-s[k]) * loss + 0.5 * s[k] for k, loss in enumerate(losses.values()))
    (expected,) = torch.autograd.grad(total, s, retain_graph=True)
    torch.testing.assert_close(method.weighting._value.grad, expected)
    assert_close(gradient_by_hand(method, trainer.model, total), seen.found[0])
    moved = method.weighting._value.detach() - start  # Adam's first step: no decay in it
    torch.testing.assert_close(moved, -0.1 * expected.sign())


def test_heads_are_decayed_as_the_model_is(tmp_path: Path) -> None:
    """Matrices at the Trainer's rate, biases not at all."""
    method = MultiTask(SPECS)
    trainer = make(tmp_path, method, data(), max_steps=1, weight_decay=0.3)
    trainer.train()
    groups = trainer._adaptation_auxiliary.optimizer.optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    own = method.models["spam"].own
    assert decays[id(own["classifier.weight"])] == 0.3 and decays[id(own["classifier.bias"])] == 0


def test_weightings_that_follow_the_losses() -> None:
    """The published numbers, and what survives a checkpoint."""
    famo, again = FAMO(), FAMO()
    for method in (famo, again):
        method.begin(["a", "b"], [2, 2])
    famo.observe(torch.tensor([1.0, 2.0]), None)
    assert famo.weights(1, 0.0, 0).tolist() == pytest.approx([4 / 3, 2 / 3])
    famo.observe(torch.tensor([0.9, 1.9]), None)
    again.load_state_dict(famo.state_dict())
    assert again._value.tolist() == pytest.approx([-0.025, 0.025], abs=1e-5)

    average = DynamicWeightAverage(window=2)
    average.begin(["a", "b"], [2, 2])
    assert average.weights(0, 0.0, 0).tolist() == [1, 1]
    for losses in ([1.0, 2.0], [3.0, 2.0], [1.5, 1.8], [1.7, 1.8]):
        average.observe(torch.tensor(losses), None)
    assert average.weights(4, 0.0, 0).tolist() == pytest.approx([0.975005, 1.024995])

    norms = GradNorm()
    norms.begin(["a", "b"], [2, 2])
    norms.observe(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))
    assert norms.weights(1, 0.0, 0).tolist() == pytest.approx([1.025, 0.975])

    classes = InverseLogClasses()
    classes.begin(["a", "b", "c"], [3, 1, None])
    assert classes.weights(0, 0.0, 0).tolist() == pytest.approx([0.910239, 1, 1])
    random = RandomWeights()
    random.begin(["a", "b"], [2, 2])
    assert random.weights(3, 0.0, 7).sum() == pytest.approx(2.0)
    assert torch.equal(random.weights(3, 0.0, 7), random.weights(3, 0.9, 7))


def test_surgery_is_on_the_gradients_of_the_whole_step(tmp_path: Path) -> None:
    """Of micro-batches (1, 0), (-1, 1) and (1, 0), (1, 1) PCGrad would make (1.25, 1.25)."""
    weight = nn.Parameter(torch.zeros(2))
    trainer = make(tmp_path, MultiTask(SPECS), data())
    gradients_of = TaskGradients([weight], 2)
    each = [((1.0, 0.0), (-1.0, 1.0)), ((1.0, 0.0), (1.0, 1.0))]
    for micro_batch in each:
        gradients_of.add(trainer, [weight @ torch.tensor(g) / 2 for g in micro_batch])
    gradients_of.write(pcgrad(gradients_of.averaged(trainer)))
    assert weight.grad.tolist() == [1.0, 1.0]
    apart = torch.stack([pcgrad(torch.tensor(g)) for g in each]).mean(0)
    assert apart.tolist() == [1.25, 1.25]


class Overflowing(ScaledTrainer):
    """A gradient of the body is infinite in the second step."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and not hasattr(self, "hooked"):
            weight = model.bert.pooler.dense.weight
            self.hooked = weight.register_hook(lambda g: g * float("inf"))
        elif self.state.global_step == 2:
            self.hooked.remove()
        return super().training_step(model, *args, **kwargs)


def test_a_step_of_surgery_that_overflows_is_left_to_the_scaler(tmp_path: Path) -> None:
    trainer = Overflowing(
        model=bert(), args=arguments(tmp_path, max_steps=3), train_dataset=data(),
        data_collator=collate,
    )  # fmt: skip
    before = trainer.model.bert.pooler.dense.weight.detach().clone()
    method = MultiTask(SPECS, surgery=pcgrad, weighting=Uncertainty())
    adapt(trainer, method).train()
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    assert trainer.accelerator.scaler.get_scale() == 2.0**7  # found once
    assert not trainer.model.bert.pooler.dense.weight.equal(before)


def test_surgery_draws_other_orders_in_each_step_and_the_same_in_another_run(
    tmp_path: Path,
) -> None:
    """And leaves torch's random state as it was."""

    def drawn() -> tuple[list[float], float]:
        found: list[float] = []

        def surgery(gradients: torch.Tensor) -> torch.Tensor:
            found.append(torch.rand(()).item())
            return gradients.sum(0)

        torch.manual_seed(3)
        method = MultiTask(SPECS, surgery=surgery)
        make(tmp_path, method, data(), max_steps=3).train()
        return found, torch.rand(()).item()

    (one, after), (again, _) = drawn(), drawn()
    assert one == again and len(set(one)) == 3
    make(tmp_path, MultiTask(SPECS), data(), max_steps=3).train()
    assert torch.rand(()).item() == after


@pytest.mark.parametrize("size, steps", CUTS)
def test_surgery_by_hand(size: int, steps: int, tmp_path: Path) -> None:
    """The body gets the direction, each head its own gradient."""
    train = data()
    method = MultiTask(SPECS, weighting={"spam": 3.0}, surgery=lambda g: pcgrad(g, seed=5))
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    trainer, (found,) = gradients(tmp_path, method, train, **cut)
    losses = losses_by_hand(method, trainer.model, train)
    losses["spam"] = 3 * losses["spam"]
    expected = gradient_by_hand(method, trainer.model, sum(losses.values()))
    body = {n: p for n, p in trainer.model.named_parameters() if n.startswith("bert.")}
    losses = losses_by_hand(method, trainer.model, train)
    losses["spam"] = 3 * losses["spam"]
    apart = []
    for loss in losses.values():
        own = torch.autograd.grad(loss, list(body.values()), retain_graph=True, allow_unused=True)
        pairs = zip(own, body.values(), strict=True)
        apart.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    direction = pcgrad(torch.stack(apart), seed=5)
    assert not torch.allclose(direction, torch.stack(apart).sum(0), rtol=1e-2)
    start = 0
    for name, weight in body.items():
        expected[name] = direction[start : start + weight.numel()].view_as(weight)
        start += weight.numel()
    assert_close(expected, found)


# ---- evaluation, export ----


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction
    return {"accuracy": float((logits.argmax(-1) == labels).mean()), "rows": float(len(labels))}


def test_evaluation_is_that_of_each_task(tmp_path: Path) -> None:
    """By a dict of data sets; the Trainer is itself again afterwards."""
    specs = {**SPECS, "spam": replace(SPAM, metrics=accuracy)}
    trainer = make(tmp_path, method := MultiTask(specs), data(), remove_unused_columns=True)
    trainer.compute_metrics = lambda prediction: {"own": 1.0}
    evaluation = {"topic": rows(7, 11, "row"), "tags": tags(6, 12), "spam": spam(9, 13)}
    trainer.train()
    trainer.evaluate(evaluation["topic"])  # which notes the columns that it needs
    before = dict(vars(trainer))
    found = trainer.evaluate(evaluation)
    assert before == {name: vars(trainer).get(name) for name in before}
    rows_of = [{**row, "task": t} for t, rows_ in evaluation.items() for row in rows_]
    expected = losses_by_hand(method, trainer.model, rows_of)
    for task, loss in expected.items():
        assert found[f"eval_{task}_loss"] == pytest.approx(loss.item(), rel=1e-4), task
    assert found["eval_topic_own"] == 1.0 and "eval_tags_own" not in found
    assert 0 <= found["eval_spam_accuracy"] <= 1 and found["eval_spam_rows"] == 9
    predicted = trainer.predict(evaluation["tags"], metric_key_prefix="test_tags")
    assert predicted.predictions.shape[-1] == 4
    assert trainer.predict(evaluation["topic"]).predictions.shape == (7, 3)


def test_the_best_model_is_chosen_and_loaded_with_its_heads(tmp_path: Path) -> None:
    method = MultiTask(SPECS)
    trainer = make(
        tmp_path, method, data(), max_steps=4, eval_strategy="steps", eval_steps=1, save_steps=1,
        save_strategy="steps", load_best_model_at_end=True, learning_rate=0.3,
        metric_for_best_model="eval_tags_loss", greater_is_better=False,
        evaluation={"topic": rows(7, 11, "row"), "tags": tags(6, 12)},
    )  # fmt: skip
    trainer.train()
    losses = [e["eval_tags_loss"] for e in trainer.state.log_history if "eval_tags_loss" in e]
    assert len(losses) == 4 and losses.index(min(losses)) < 3
    assert trainer.evaluate()["eval_tags_loss"] == pytest.approx(min(losses), rel=1e-5)


AUTO = {
    "topic": AutoModelForSequenceClassification,
    "tags": AutoModelForTokenClassification,
    "spam": AutoModelForSequenceClassification,
    "span": AutoModelForQuestionAnswering,
}


@pytest.mark.parametrize("adapters", [False, True])
def test_an_exported_model_is_that_of_the_mixture(
    adapters: bool, tmp_path: Path, caplog: Any
) -> None:
    span_task = TaskSpec(head="question_answering", collator=_batch)
    specs = {**SPECS, "span": span_task, "spam": replace(SPAM, num_labels=["ham", "spam"])}
    method, model = MultiTask(specs), bert()
    if adapters:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False))
    train = {"topic": rows(8, 1, "row"), "tags": tags(8), "spam": spam(8)}
    train["span"] = with_labels(8, 4, span)
    trainer = make(tmp_path, method, mix(train), model)
    trainer.train()
    batch = collate(list(rows(5, 21, None)))
    trainer.model.eval()
    for task, auto in AUTO.items():
        method.export(task, tmp_path / task)
        plain, info = auto.from_pretrained(tmp_path / task, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        head = method.models[task].model if task in method.models else trainer.model
        head.eval()
        for key, value in plain.eval()(**batch).items():
            torch.testing.assert_close(value, head(**batch)[key], rtol=1e-4, atol=1e-5)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "spam").config
    assert config.id2label == {0: "ham", 1: "spam"}


# ---- order, refusals ----


def test_workers_change_nothing(tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        method = MultiTask(SPECS)
        options = {"dataloader_persistent_workers": True} if workers else {}
        trainer = make(
            tmp_path, method, data(), max_steps=8, dataloader_num_workers=workers, **options
        )
        trainer.train()
        found.append({n: p.detach().clone() for n, p in parameters(method, trainer.model).items()})
    assert_close(*found)


ROWS = rows(9, 1, "row")


def two(spec: TaskSpec, others: Any, own: Any = ROWS) -> tuple[MultiTask, Any]:
    """A task beside one of three classes."""
    return MultiTask({"topic": None, "other": spec}), mix({"topic": own, "other": others})


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "one name twice": (lambda: MultiTask([("a", TOPIC), ("a", SPAM)]), "Two tasks are named 'a'"),
    "one task": (lambda: MultiTask(["a"]), "two tasks or more"),
    "a head": (lambda: TaskSpec(head="tagger"), "'tagger' is unknown"),  # type: ignore[arg-type]
    "a weight": (lambda: (MultiTask(SPECS, weighting={"ham": 1.0}), data()), "names 'ham', and"),
    "a weighting": (
        lambda: MultiTask(SPECS, weighting="uncertainty"),  # type: ignore[arg-type]
        "expected a dict of numbers",
    ),
    "a quota that does not add up": (
        lambda: data(sampling={"topic": 0.5, "tags": 0.2}),
        "they add up to 0.7",
    ),
    "a task without rows": (
        lambda: (MultiTask({"topic": None, "spam": SPAM, "ham": SPAM}), data()),
        "mixture has the tasks",
    ),
    "a task without rows in a list": (
        lambda: (MultiTask({**SPECS, "ham": SPAM}), [dict(row) for row in data()]),
        "No row of the task 'ham'",
    ),
    "no column": (lambda: (MultiTask(SPECS), ROWS), "has None in its column 'task'"),
    "labels out of range": (lambda: two(SPAM, ROWS), "classes go from 0 to 1"),
    "the own task's labels": (
        lambda: two(SPAM, ROWS, rows(9, 1, "token")),
        "not the number of one class",
    ),
    "no labels": (lambda: two(SPAM, tags(9)), "has no labels"),
    "two label columns": (
        lambda: two(TAGS, tags(9).add_column("labels", [1] * 9)),
        "a batch has one set of labels",
    ),
    "a task without a share": (
        lambda: (
            MultiTask({"topic": None, "spam": SPAM}),
            mix({"topic": ROWS, "spam": spam(9)}, sampling={"topic": 1.0}),
        ),
        "no row of 'spam' in an epoch",
    ),
    "a name": (lambda: MultiTask({"topic": None, "train": SPAM}), "not 'train'"),
    "no size": (lambda: two(TaskSpec(), ROWS), "size of its head"),
    "no such head": (
        lambda: two(TaskSpec(num_labels=2, head="audio_classification"), ROWS),
        "There is no audio_classification head",
    ),
    "a collator": (lambda: two(replace(TAGS, collator=None), tags(9)), "need a collator"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused(kind: str, tmp_path: Path) -> None:
    make_it, message = BAD[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        make(tmp_path, *make_it()).train()


# ---- kinds of data, and what else a run may have ----


@pytest.mark.parametrize("kind", ["a column", "torch", "a stream", "streams"])
def test_kinds_of_datasets(kind: str, tmp_path: Path) -> None:
    """Four steps of each, the same rows."""
    train: Any = [dict(row) for row in data()]
    if kind in ("a column", "a stream"):  # of other tasks a row has None
        train = datasets.Dataset.from_list([{"tags": None, "labels": None, **row} for row in train])
    if kind == "a stream":
        train = train.to_iterable_dataset()
    elif kind == "streams":
        given = {"topic": ROWS, "tags": tags(8), "spam": spam(8)}
        train = mix({n: d.to_iterable_dataset() for n, d in given.items()}, "equal", size=24)
    method = MultiTask(SPECS)
    trainer = make(tmp_path, method, train, max_steps=4, per_device_train_batch_size=6)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["multitask/tags"] < 3 for entry in entries)
    assert sum(entry["loss/task"] > 0 for entry in entries) > 1


@pytest.mark.parametrize("shares", [True, False])
def test_beside_a_knowledge_graph(shares: bool, tmp_path: Path) -> None:
    """One head for all learns with what it adds to batches; others are refused by name."""
    train = mix({"topic": toy.rows(12, 1), "other": toy.rows(12, 2)})
    trainer = injectors.trainer(tmp_path, data=train, max_steps=2)
    other = TaskSpec(head="shared") if shares else TaskSpec(num_labels=3)
    trainer = adapt(trainer, MultiTask({"topic": None, "other": other}), injection())
    if not shares:
        with pytest.raises(ValueError, match="the heads of other run on its body alone"):
            trainer.train()
        return
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss/other"] > 0 and entry["knowledge/mentions_per_row"] > 0


@pytest.mark.parametrize("what", ["fsdp", "deepspeed"])
@pytest.mark.parametrize(
    "method, message",
    [
        (lambda: MultiTask(SPECS), "The heads of tags, spam run on the body"),
        (
            lambda: MultiTask({"topic": None, "spam": TaskSpec(head="shared")}, surgery=pcgrad),
            "multitask works on whole gradients",
        ),
    ],
)
def test_what_shards_weights_is_refused(
    method: Callable[[], MultiTask], message: str, what: str, tmp_path: Path
) -> None:
    trainer = make(tmp_path, method(), data())
    setattr(trainer, f"is_{what}_enabled", True)
    with pytest.raises(ValueError, match=message):
        trainer.train()


# ---- rows and collators of a user's own ----


def test_a_collator_of_its_own_sees_all_columns_and_makes_the_labels(tmp_path: Path) -> None:
    """Texts that it tokenises, tokens that it masks; the own task's classes by name."""
    own = toy.tokenizer()
    texts = [{"text": text, "mark": "w"} for text in toy.sentences(8, 1)]

    def tokenize(given: list[dict[str, Any]]) -> Any:
        batch = own([row["text"] for row in given], padding=True, return_tensors="pt")
        return {**batch, "labels": torch.ones(len(given), dtype=torch.long)}

    def numbered(given: list[dict[str, Any]]) -> Any:
        classes = {"a": 0, "b": 1, -100: -100}
        return collate([{**row, "labels": classes[row["labels"]]} for row in given])

    named = [{**row, "labels": "ab"[i % 2]} for i, row in enumerate(rows(8, 1, None))]
    masking = DataCollatorForLanguageModeling(own, mlm_probability=0.5)
    method = MultiTask(
        {
            "topic": None,
            "text": replace(SPAM, collator=tokenize),
            "mask": TaskSpec(head="masked_lm", collator=masking),
        }
    )
    train = mix({"topic": named, "text": texts, "mask": rows(8, 2, None)})
    trainer = make(tmp_path, method, train, bert(), max_steps=6)
    trainer.data_collator = numbered
    trainer.train()
    (masked,) = [e["multitask/mask"] for e in trainer.state.log_history[:1]]
    assert 3 < masked < 6
    found = trainer.evaluate({"text": datasets.Dataset.from_list(texts)})
    assert found["eval_text_loss"] > 0


def test_rows_without_labels_are_predicted(tmp_path: Path) -> None:
    trainer = make(tmp_path, MultiTask(SPECS), data(), max_steps=1)
    trainer.train()
    found = trainer.predict(rows(7, 4, None), metric_key_prefix="test_spam")
    assert found.predictions.shape == (7, 2) and found.label_ids is None


def test_many_rows_of_one_task_before_those_of_another(tmp_path: Path) -> None:
    """Nothing but the column of tasks is read to find them."""
    one = {"input_ids": [5, 6], "attention_mask": [1, 1], "task": "topic", "labels": 1}
    train = datasets.Dataset.from_list([one] * 10_010 + [{**one, "task": "spam"}] * 8)
    method = MultiTask({"topic": None, "spam": SPAM})
    make(tmp_path, method, train, max_steps=1).train()
    with pytest.raises(ValueError, match="No row of the task 'ham'"):
        make(tmp_path, MultiTask({"topic": None, "spam": SPAM, "ham": SPAM}), train).train()


# ---- logs, options of the Trainer, a new process ----


def test_a_rare_task_is_logged_as_it_is(tmp_path: Path) -> None:
    """A mean over the steps that have its rows."""
    train = mix({"topic": rows(36, 1, "row"), "spam": spam(4)})
    method = MultiTask({"topic": None, "spam": SPAM})
    settings = {"max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    trainer = make(tmp_path, method, train, logging_steps=20, **settings)
    trainer.train()
    expected = losses_by_hand(method, trainer.model, train)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["multitask/spam"] == pytest.approx(expected["spam"].item(), rel=0.02)
    assert entry["loss/task"] == pytest.approx(expected["topic"].item(), rel=0.02)


def test_label_smoothing_is_the_own_tasks(tmp_path: Path) -> None:
    spec = TaskSpec(num_labels=1, problem_type="regression")
    own = mix({"topic": ROWS, "other": with_labels(9, 4, numbers)})
    trainer = make(
        tmp_path, MultiTask({"topic": None, "other": spec}), own, label_smoothing_factor=0.1
    )
    trainer.train()
    assert trainer.evaluate({"other": with_labels(9, 5, numbers)})["eval_other_loss"] > 0


def test_saved_heads_are_found_beside_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a new process, for evaluation, export and further training."""
    trainer = make(tmp_path, MultiTask(SPECS), data(), learning_rate=0.1)
    with caplog.at_level("WARNING", "hf_adapt"):
        untrained = trainer.evaluate({"tags": tags(6, 12)})
        assert "The head of the task 'tags' is new" in caplog.text
    trainer.train()
    found = trainer.evaluate({"tags": tags(6, 12)})
    assert found["eval_tags_loss"] != untrained["eval_tags_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    caplog.clear()
    other = make(tmp_path / "other", MultiTask(SPECS), data(), again)
    with caplog.at_level("WARNING", "hf_adapt"):
        assert other.evaluate({"tags": tags(6, 12)})["eval_tags_loss"] == found["eval_tags_loss"]
    assert not caplog.text


def test_a_further_trainer_has_rates_of_its_own(tmp_path: Path) -> None:
    method, model = MultiTask(SPECS), bert()
    for rate in (1e-3, 0.1):
        trainer = make(tmp_path, method, data(), model, learning_rate=rate, max_steps=1)
        trainer.train()
        assert method.learning_rate == rate


@pytest.mark.parametrize("surgery", [mgda, cagrad, imtl_g, nash_mtl])
def test_surgery_is_among_the_tasks_of_the_step(surgery: Any, tmp_path: Path) -> None:
    """Steps of one row: the only task gets its own direction, and the model moves."""
    settings = {"per_device_train_batch_size": 1, "max_steps": 3}
    found = gradients(tmp_path / "with", MultiTask(SPECS, surgery=surgery), data(), **settings)[1]
    plain = gradients(tmp_path / "without", MultiTask(SPECS), data(), **settings)[1]
    for one, other in zip(found, plain, strict=True):
        norms = [
            torch.cat([g.flatten() for n, g in each.items() if n.startswith("bert")]).norm()
            for each in (one, other)
        ]
        assert norms[0] > 0
        if surgery in (mgda, imtl_g):  # the direction of one task is its gradient
            torch.testing.assert_close(*norms)


OTHERS: dict[str, Callable[[], Any]] = {
    "fgm": lambda: FGM(),
    "vat": lambda: VAT(),
    "rdrop": lambda: RDrop(),
    "keep_predictions": lambda: KeepPredictions(0.5),
    "distillation": lambda: Distillation(bert(seed=1)),
    "replay": lambda: Replay(rows(9, 5, "row"), ratio=0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_beside_a_method_on_the_own_rows(name: str, tmp_path: Path) -> None:
    """In micro-batches of one row, of which most have no row of the own task."""
    trainer = make(
        tmp_path, MultiTask(SPECS), data(), max_steps=6, per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    adapt(trainer, OTHERS[name]()).train()
    for entry in trainer.state.log_history:
        assert all(v == v for v in entry.values() if isinstance(v, float)), entry
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_compiled_graph_is_refused_where_it_is_gone_through_twice(tmp_path: Path) -> None:
    trainer = make(tmp_path, MultiTask(SPECS, surgery=pcgrad), data())
    trainer.args.torch_compile = True
    with pytest.raises(ValueError, match="Leave torch_compile out"):
        trainer.train()
