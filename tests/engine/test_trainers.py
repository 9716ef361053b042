"""The one-line callback on every kind of Trainer and of training data.

The author's Trainer must go on meaning what it meant: its own loss on the source rows alone, its
own sampler over the source, its number of steps. Each test compares with the plain Trainer, or with
what the Trainer was in fact given.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from typing import Any

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import (
    BertForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_adapt import (
    DANN,
    MMD,
    AdaptationCallback,
    DomainAdversarialCallback,
    InformationMaximization,
    adapt,
)
from tests.helpers.data import MapStyle, Stream, collate, rows, sentence_pairs, texts
from tests.helpers.libraries import BATCH, SFT_DATA, sentence_trainer, sft
from tests.helpers.models import bert, llama
from tests.helpers.trainers import arguments, flat_gradient

SOURCE = rows(13, seed=0, low=5, high=34)
TARGET = rows(9, seed=1, labels=None, low=34)


class RecordingCollator:
    """Collates, and keeps the tokens of the rows of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, ...]]] = []

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.batches.append([tuple(map(int, row["input_ids"])) for row in features])
        return collate(features)

    def sources(self) -> list[list[tuple[int, ...]]]:
        """The source rows of each batch: their tokens lie below 34."""
        return [[row for row in batch if max(row) < 34] for batch in self.batches]

    def targets(self) -> list[list[tuple[int, ...]]]:
        return [[row for row in batch if max(row) >= 34] for batch in self.batches]


class InputRecorder:
    """Keeps what a model was given in its training forwards."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.inputs: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            self.inputs.append(
                {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
            )


def losses(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def terms() -> list[Any]:
    return [DANN(ramp=None, hidden_sizes=(8,)), MMD(), InformationMaximization()]


def assert_adapted(trainer: Trainer, *names: str) -> None:
    """Every step logged the task's loss and each term, finite, and the terms reached the model."""
    for name in ("loss/task", "loss/dann", "dann/domain_accuracy", *names):
        values = losses(trainer, name)
        assert len(values) == trainer.state.global_step > 0, name
        assert all(map(math.isfinite, values)), name
    assert all(0 < ratio < 1 for ratio in losses(trainer, "dann/gradient_ratio"))


# ---- what the author set up stays: steps, epochs, order, batch size ----


def length_grouping() -> dict[str, Any]:
    """`group_by_length`, which transformers 5 calls a sampling strategy."""
    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"dataloader_drop_last": True},
        {"remove_unused_columns": False},
        length_grouping(),
    ],
    ids=lambda settings: next(iter(settings), "default"),
)
def test_source_rows_steps_and_epochs_are_the_plain_trainers(
    settings: dict[str, Any], ratio: float, tmp_path: Any
) -> None:
    seen = []
    for adapted in (False, True):
        collator = RecordingCollator()
        trainer = Trainer(
            model=bert(),
            args=arguments(tmp_path, max_steps=-1, num_train_epochs=2, **settings),
            train_dataset=SOURCE,
            data_collator=collator,
        )
        if adapted:
            trainer.add_callback(DomainAdversarialCallback(TARGET, target_ratio=ratio))
        result = trainer.train()
        state = trainer.state
        assert state.train_batch_size == BATCH
        seen.append((collator.sources(), state.global_step, state.max_steps, state.epoch))
        epochs = [entry["epoch"] for entry in state.log_history]
        seen[-1] += (epochs, result.metrics["epoch"])
        if adapted:
            rows_seen = sum(map(len, collator.sources()))
            if "dataloader_drop_last" not in settings:
                assert sum(map(len, collator.targets())) == 2 * int(13 * ratio)
                assert rows_seen == 26
                # The second epoch goes on where the first one ended in the target.
                drawn = Counter(row for batch in collator.targets() for row in batch)
                assert len(drawn) == len(TARGET)
                assert max(drawn.values()) - min(drawn.values()) <= 1
        else:
            assert not any(collator.targets())
    assert seen[0] == seen[1]


def test_length_grouping_reads_the_source(tmp_path: Any) -> None:
    """The longest row of the source comes first, whatever the target's lengths."""
    long = datasets.Dataset.from_list([{**TARGET[0], "input_ids": [40] * 60}] * 9)
    long = long.map(lambda row: {"attention_mask": [1] * 60})
    collator = RecordingCollator()
    args = arguments(tmp_path, **length_grouping())
    trainer = Trainer(model=bert(), args=args, train_dataset=SOURCE, data_collator=collator)
    trainer.add_callback(DomainAdversarialCallback(long))
    trainer.train()
    first = collator.sources()[0]
    assert len(first[0]) == max(len(row["input_ids"]) for row in SOURCE)


# ---- where the source and the targets come from ----


OTHER = rows(7, seed=2, labels=None, low=34, high=50)
TARGETS: dict[str, tuple[Any, Any, int]] = {
    "dataset": (SOURCE, TARGET, 2),
    "torch-datasets": (MapStyle(SOURCE), MapStyle(TARGET), 2),
    "lists-of-rows": (SOURCE.to_list(), TARGET.to_list(), 2),
    "formatted": (SOURCE.with_format("torch"), TARGET.with_format("torch"), 2),
    "transformed": (SOURCE.with_transform(lambda batch: batch), TARGET, 2),
    "several": (SOURCE, [TARGET, OTHER], 3),
    "named": (SOURCE, {"mail": TARGET, "news": OTHER}, 3),
    "hf-streams": (SOURCE.to_iterable_dataset(), TARGET.to_iterable_dataset(), 2),
    "torch-streams": (Stream(SOURCE), Stream(TARGET), 2),
    "stream-and-map": (SOURCE.to_iterable_dataset(), TARGET, 2),
    "streams": (Stream(SOURCE), [Stream(TARGET), Stream(OTHER)], 3),
}


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_kinds_of_source_and_target(name: str, remove_unused_columns: bool, tmp_path: Any) -> None:
    source, target, domains = TARGETS[name]
    collator = RecordingCollator()
    objectives = terms()
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path, max_steps=5, remove_unused_columns=remove_unused_columns),
        train_dataset=source,
        data_collator=collator,
        callbacks=[AdaptationCallback(*objectives, target_dataset=target)],
    )
    trainer.train()
    assert trainer.state.global_step == 5
    assert_adapted(trainer, "loss/mmd", "loss/information_maximization")
    assert objectives[0].module[-1].out_features == domains
    assert [len(b) for b in collator.sources()] == [len(b) for b in collator.targets()]
    assert {row for batch in collator.sources() for row in batch} == {
        tuple(row["input_ids"]) for row in SOURCE
    }


def with_domain(*values: Any) -> datasets.Dataset:
    """Rows of several domains in one dataset, all labelled; the first value's are the source's."""
    parts = []
    for i, value in enumerate(values):
        part = rows(12, seed=i, low=34 if i else 5, high=64 if i else 34)
        parts.append(part.add_column("domain", [value] * len(part)))
    return datasets.concatenate_datasets(parts).shuffle(seed=0)


@pytest.mark.parametrize(
    ("values", "source_domain"),
    [
        ((0, 1), None),
        (("source", "mail"), None),
        (("reviews", "mail"), "reviews"),
        ((0, 1, 2), None),
        ((2, 0, 1), 2),
        (("source", "mail", "news"), None),
    ],
)
@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_a_domain_column_splits_the_training_set(
    values: tuple[Any, ...], source_domain: Any, remove_unused_columns: bool, tmp_path: Any
) -> None:
    collator, model, objectives = RecordingCollator(), bert(), terms()
    recorder = InputRecorder(model)
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=-1,
            num_train_epochs=1,
            remove_unused_columns=remove_unused_columns,
        ),
        train_dataset=with_domain(*values),
        data_collator=collator,
        callbacks=[AdaptationCallback(*objectives, source_domain=source_domain)],
    )
    trainer.train()
    assert trainer.state.global_step == 3, "an epoch is one pass over the 12 source rows"
    assert_adapted(trainer)
    assert objectives[0].module[-1].out_features == len(values)
    for inputs, sources in zip(recorder.inputs, collator.sources(), strict=True):
        assert len(sources) == BATCH
        assert (inputs["labels"] != -100).tolist() == [True] * BATCH + [False] * BATCH


@pytest.mark.parametrize("values", [(0, 1), ("source", "mail")])
def test_a_domain_column_splits_a_stream(values: tuple[Any, Any], tmp_path: Any) -> None:
    collator = RecordingCollator()
    trainer = Trainer(
        model=bert(),
        args=arguments(tmp_path, max_steps=4),
        train_dataset=with_domain(*values).to_iterable_dataset(),
        data_collator=collator,
        callbacks=[AdaptationCallback(*terms())],
    )
    trainer.train()
    assert_adapted(trainer)
    assert [len(batch) for batch in collator.sources()] == [BATCH] * len(collator.batches)
    assert [len(batch) for batch in collator.targets()] == [BATCH] * len(collator.batches)


def collate_with_domain(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate(features)
    if "domain" in features[0]:
        batch["domain"] = torch.tensor([row["domain"] for row in features])
    return batch


def test_evaluation_data_may_have_a_domain_column(tmp_path: Any) -> None:
    dev = with_domain(0, 1).select(range(6))
    model, given = bert(), set()
    # Many models swallow an argument they do not know: look at what they are given.
    model.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False, eval_strategy="steps", eval_steps=2),
        train_dataset=with_domain(0, 1),
        eval_dataset=dev,
        data_collator=collate_with_domain,
        callbacks=[AdaptationCallback(*terms())],
    )
    trainer.train()
    assert all(map(math.isfinite, losses(trainer, "eval_loss")))
    assert losses(trainer, "eval_loss")
    with_column = trainer.evaluate()["eval_loss"]
    without = trainer.evaluate(dev.remove_columns("domain"))["eval_loss"]
    assert with_column == without
    assert len(trainer.predict(dev).predictions) == 6
    assert "input_ids" in given and "domain" not in given


# ---- an author's own Trainer ----


WEIGHTS = torch.tensor([1.0, 3.0, 0.5])


class Weighted(Trainer):
    """Weighted cross-entropy; takes the labels out of the inputs."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


class RDrop(Trainer):
    """Two forwards with different dropout, drawn together."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        inputs = {k: v for k, v in inputs.items() if k != "num_items_in_batch"}
        labels = inputs.pop("labels")
        first, second = model(**inputs), model(**inputs)
        one, two = first.logits, second.logits
        task = F.cross_entropy(one, labels) + F.cross_entropy(two, labels)
        apart = F.kl_div(
            one.log_softmax(-1), two.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        return (task / 2 + apart, first) if return_outputs else task / 2 + apart


class Teacher(Trainer):
    """A forward without gradients comes before the one that is trained."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        with torch.no_grad():
            model(**{k: v for k, v in inputs.items() if k != "labels"})
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.mark.parametrize("cls", [Weighted, RDrop, Teacher])
@pytest.mark.parametrize("target_forward", ["joint", "separate"])
def test_an_authors_own_loss_sees_what_it_saw(
    cls: type[Trainer], target_forward: Any, tmp_path: Any
) -> None:
    made = []
    for adapted in (False, True):
        trainer = cls(
            model=bert(),
            args=arguments(tmp_path),
            train_dataset=SOURCE,
            eval_dataset=SOURCE.select(range(5)),
            data_collator=collate,
        )
        if adapted:
            trainer.add_callback(
                AdaptationCallback(*terms(), target_dataset=TARGET, target_forward=target_forward)
            )
        trainer.train()
        made.append(trainer)
    plain, trainer = made
    assert_adapted(trainer, "loss/mmd", "loss/information_maximization")
    assert losses(trainer, "loss/task")[0] == pytest.approx(losses(plain)[0], rel=2e-4)
    assert type(trainer).__name__ == cls.__name__ and isinstance(trainer, cls)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_a_loss_that_couples_rows_sees_the_source_alone_when_separate(tmp_path: Any) -> None:
    """R-Drop's second term has no label to ignore: `separate` keeps target rows out of it."""
    sizes: list[int] = []

    class Watched(RDrop):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(inputs["input_ids"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = bert(dropout=True)
    trainer = Watched(
        model=model, args=arguments(tmp_path), train_dataset=SOURCE, data_collator=collate
    )
    adapt(trainer, *terms(), target_dataset=TARGET, target_forward="separate").train()
    assert set(sizes) == {BATCH}
    assert_adapted(trainer)


class OwnLoader(Trainer):
    """Balances the classes with a sampler of its own, from the dataset's label column."""

    def get_train_dataloader(self) -> DataLoader:
        labels = torch.tensor(self.train_dataset["labels"][:])
        weights = 1.0 / torch.bincount(labels)[labels]
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            sampler=WeightedRandomSampler(weights.tolist(), 8, generator=generator),
            collate_fn=self.data_collator,
        )
        return self.accelerator.prepare(loader)


def test_an_authors_own_loader_is_paired(tmp_path: Any) -> None:
    seen = []
    for adapted in (False, True):
        collator = RecordingCollator()
        trainer = OwnLoader(
            model=bert(),
            args=arguments(tmp_path, max_steps=-1, num_train_epochs=2),
            train_dataset=SOURCE,
            data_collator=collator,
        )
        if adapted:
            trainer.add_callback(AdaptationCallback(*terms(), target_dataset=TARGET))
        trainer.train()
        seen.append((collator.sources(), trainer.state.global_step))
    assert_adapted(trainer)
    assert seen[0] == seen[1]
    assert [len(batch) for batch in collator.targets()] == [BATCH] * 4


class SelectingLoader(OwnLoader):
    def get_train_dataloader(self) -> DataLoader:
        data = self.train_dataset.select(range(8))
        return DataLoader(data, batch_size=BATCH, collate_fn=self.data_collator)


class DeafLoader(OwnLoader):
    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(SOURCE, batch_size=BATCH, collate_fn=collate)


@pytest.mark.parametrize("cls", [SelectingLoader, DeafLoader])
def test_a_loader_that_loses_the_target_is_refused(cls: type[Trainer], tmp_path: Any) -> None:
    trainer = cls(
        model=bert(), args=arguments(tmp_path), train_dataset=SOURCE, data_collator=collate
    )
    trainer.add_callback(DomainAdversarialCallback(TARGET))
    with pytest.raises(ValueError, match=r"Build the DataLoader from self\.train_dataset"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert trainer.train_dataset is SOURCE and trainer.data_collator is collate


def test_a_dict_of_training_sets_is_refused(tmp_path: Any) -> None:
    both = datasets.DatasetDict({"a": SOURCE, "b": SOURCE})
    trainer = Trainer(
        model=bert(), args=arguments(tmp_path), train_dataset=both, data_collator=collate
    )
    trainer.add_callback(DomainAdversarialCallback(TARGET))
    with pytest.raises(ValueError, match="concatenate_datasets"):
        trainer.train()


class MyTagger(BertForTokenClassification):
    """A model class of an author's own, with another name."""


def test_an_authors_own_model_class_aligns_tokens_too(tmp_path: Any) -> None:
    """What a model predicts is not read off the name of its class alone."""
    torch.manual_seed(0)
    model = MyTagger(bert("token").config)
    recorder, items = InputRecorder(model), []
    objectives = terms()
    original = objectives[0].loss

    def loss(batch: Any) -> Any:
        total, count = original(batch)
        items.append(int(count))
        return total, count

    objectives[0].loss = loss
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=rows(13, seed=0, labels="token", high=34),
        data_collator=collate,
    )
    trainer.add_callback(AdaptationCallback(*objectives, target_dataset=TARGET))
    trainer.train()
    assert_adapted(trainer)
    assert items[1:] == [int(inputs["attention_mask"].sum()) for inputs in recorder.inputs]


# ---- target_forward="separate" ----


def collate_floats(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in features])
    if "labels" in features[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in features], dtype=torch.float32)
    return batch


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
@pytest.mark.parametrize("target_forward", ["joint", "separate"])
def test_heads_whose_loss_ignores_no_label(
    problem: str, target_forward: Any, tmp_path: Any
) -> None:
    size = 1 if problem == "regression" else 3
    labels = [[float((i + j) % 2) for j in range(size)] for i in range(len(SOURCE))]
    values = labels if size > 1 else [label[0] for label in labels]
    source = SOURCE.remove_columns("labels").add_column("labels", values)
    made = []
    for adapted in (False, True):
        trainer = Trainer(
            model=bert(num_labels=size, problem_type=problem),
            args=arguments(tmp_path),
            train_dataset=source,
            data_collator=collate_floats,
        )
        if adapted:
            plan = {"target_dataset": TARGET, "target_forward": target_forward}
            trainer.add_callback(AdaptationCallback(DANN(ramp=None), MMD(), **plan))
            if target_forward == "joint":
                with pytest.raises(ValueError, match="target_forward='separate'"):
                    trainer.train()
                return
        trainer.train()
        made.append(trainer)
    plain, trainer = made
    assert_adapted(trainer, "loss/mmd")
    assert losses(trainer, "loss/task")[0] == pytest.approx(losses(plain)[0], rel=2e-4)


class FirstGradient(Trainer):
    """Keeps the gradient of the first step."""

    first: torch.Tensor | None = None

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, *args, **kwargs)
        if self.first is None:
            self.first = flat_gradient(model)
        return loss


def test_separate_is_joint_where_rows_do_not_couple(tmp_path: Any) -> None:
    gradients, logged = [], []
    for target_forward in ("joint", "separate"):
        trainer = FirstGradient(
            model=bert(), args=arguments(tmp_path), train_dataset=SOURCE, data_collator=collate
        )
        objectives = terms()
        adapt(trainer, *objectives, target_dataset=TARGET, target_forward=target_forward).train()
        assert trainer.first is not None
        gradients.append(trainer.first)
        names = ("loss/task", "loss/dann", "loss/mmd", "loss/information_maximization")
        logged.append([losses(trainer, name)[0] for name in names])
    norm = float(gradients[0].norm())
    assert norm > 1e-2
    assert float((gradients[1] - gradients[0]).norm()) / norm < 1e-6
    assert logged[1] == pytest.approx(logged[0], abs=1e-6)


# ---- Seq2SeqTrainer ----


def test_seq2seq_trainer_generates(tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    generated: list[tuple[int, ...]] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        generated.append(prediction.predictions.shape)
        return {"rows": float(len(prediction.predictions))}

    trainer = Seq2SeqTrainer(
        model=T5ForConditionalGeneration(config),
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            predict_with_generate=True,
            generation_max_length=4,
            max_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=BATCH,
        ),
        train_dataset=rows(13, seed=0, labels="lm", high=34),
        eval_dataset=rows(5, seed=3, labels="lm", high=34),
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    trainer.add_callback(AdaptationCallback(DANN(ramp=None), MMD(), target_dataset=TARGET))
    trainer.train()
    assert_adapted(trainer, "loss/mmd")
    assert losses(trainer, "eval_rows") == [5.0, 5.0]
    assert [shape[0] for shape in generated] == [5, 5], "tokens, not logits"
    assert all(len(shape) == 2 for shape in generated)
    assert isinstance(trainer, Seq2SeqTrainer) and type(trainer).__name__ == "Seq2SeqTrainer"


# ---- TRL's SFTTrainer ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SFT_DATA)
def test_sft_trainer(name: str, lora: bool, tmp_path: Any) -> None:
    """The target is raw text, tokenised by the Trainer; its tokens are never learnt."""
    source, target, settings = SFT_DATA[name]
    plain = sft(tmp_path / "plain", source, lora, **settings)
    plain.train()
    trainer = sft(tmp_path / "adapted", source, lora, **settings)
    recorder = InputRecorder(trainer.model)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    objectives = [DANN(ramp=None, hidden_sizes=(8,)), MMD()]
    trainer.add_callback(AdaptationCallback(*objectives, target_dataset=target))
    trainer.train()
    assert_adapted(trainer, "loss/mmd")
    assert losses(trainer, "loss/task")[0] == pytest.approx(losses(plain)[0], rel=1e-3)
    for inputs in recorder.inputs:
        assert len(inputs["input_ids"]) == 2 * BATCH
        learnt = inputs["labels"] != -100
        assert bool(learnt[:BATCH].any(1).all()) and not bool(learnt[BATCH:].any())
        if name != "text":  # prompts are read, not learnt
            real = inputs["attention_mask"][:BATCH].bool()
            assert bool((real & ~learnt[:BATCH]).any(1).all())
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and (not lora or all("lora_" in k for k in changed))
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    plain.save_model()
    files = set(os.listdir(tmp_path / "plain")) | {"adaptation.safetensors"}
    assert set(os.listdir(tmp_path / "adapted")) == files
    if lora:
        peft.PeftModel.from_pretrained(llama(), str(tmp_path / "adapted"))
    else:
        _, info = type(llama()).from_pretrained(tmp_path / "adapted", output_loading_info=True)
        assert not any(info.values())


def test_sft_metrics_are_the_plain_trainers(tmp_path: Any) -> None:
    """The first batch's probe leaves nothing in what TRL logs; the accuracy is the source's."""
    plain, trainer = (sft(tmp_path, texts(6), learning_rate=0.0) for _ in range(2))
    adapt(trainer, DANN(), target_dataset=texts(35))
    plain.train()
    trainer.train()
    expected, metrics = plain.evaluate(), trainer.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
    first, other = plain.state.log_history[0], trainer.state.log_history[0]
    assert other["mean_token_accuracy"] == pytest.approx(first["mean_token_accuracy"])
    assert set(first) <= set(other)
    assert first["num_tokens"] < other["num_tokens"] <= 3 * first["num_tokens"]


@pytest.mark.filterwarnings("ignore:You are using packing:UserWarning")
@pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True},
        {"padding_free": True, "max_length": None},
    ],
    ids=["wrapped", "packing", "padding_free"],
)
def test_sft_refuses_merged_rows(settings: dict[str, Any], tmp_path: Any) -> None:
    trainer = sft(tmp_path, texts(6), **settings)
    trainer.add_callback(DomainAdversarialCallback(texts(35)))
    with pytest.raises(ValueError, match="merges rows"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- sentence-transformers ----


@pytest.fixture
def sentence_transformers() -> Any:
    return pytest.importorskip("sentence_transformers")


def watch_loss(trainer: Any) -> list[torch.Tensor]:
    """The tokens of the first column that the author's loss is given in training."""
    seen: list[torch.Tensor] = []
    inner = trainer.loss.forward

    def forward(features: Any, labels: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(features[0]["input_ids"].clone())
        return inner(features, labels)

    trainer.loss.forward = forward
    return seen


@pytest.mark.parametrize(
    ("loss", "score", "settings"),
    [
        ("MultipleNegativesRankingLoss", None, {}),
        ("MultipleNegativesRankingLoss", None, {"batch_sampler": "no_duplicates"}),
        ("CosineSimilarityLoss", "score", {}),
        ("CosineSimilarityLoss", "label", {"batch_sampler": "group_by_label"}),
    ],
    ids=["ranking", "ranking-no-duplicates", "cosine-score", "cosine-by-label"],
)
def test_sentence_transformer_trainer(
    loss: str,
    score: str | None,
    settings: dict[str, Any],
    tmp_path: Any,
    sentence_transformers: Any,
) -> None:
    """In-batch negatives couple the rows: the loss sees source rows alone, without being told."""
    for name in ("plain", "adapted"):
        (tmp_path / name).mkdir()
    plain = sentence_trainer(tmp_path / "plain", loss, score, **settings)
    expected = watch_loss(plain)
    plain.train()
    trainer = sentence_trainer(tmp_path / "adapted", loss, score, **settings)
    seen = watch_loss(trainer)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    objectives = [DANN(ramp=None, hidden_sizes=(8,)), MMD()]
    trainer.add_callback(AdaptationCallback(*objectives, target_dataset=sentence_pairs(30)))
    trainer.train()
    assert_adapted(trainer, "loss/mmd")
    assert losses(trainer, "loss/task")[0] == pytest.approx(losses(plain)[0], rel=1e-3)
    assert trainer.state.global_step == plain.state.global_step == 3
    assert len(seen) == 3 and all(map(torch.equal, seen, expected))
    assert any(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    plain.save_model()
    files = {n: set(os.listdir(tmp_path / n / "out")) for n in ("plain", "adapted")}
    assert files["adapted"] == files["plain"] | {"adaptation.safetensors"}
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "adapted" / "out"))
    vectors = [m.encode(["w1 w2 w3"]) for m in (again, trainer.model)]
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)


@pytest.mark.usefixtures("sentence_transformers")
def test_sentence_transformer_features_honour_the_mask(tmp_path: Any) -> None:
    """Each text column has a mask of its own; padding must not enter the mean."""
    trainer = sentence_trainer(tmp_path, "MultipleNegativesRankingLoss", None)
    seen: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    objective = DANN(ramp=None, hidden_sizes=(8,))
    original = objective.loss

    def loss(batch: Any) -> Any:
        seen.append(batch.features()[0].detach()[:BATCH])
        part = batch.parts[0].inputs
        ids, mask = part["anchor_input_ids"], part["anchor_attention_mask"]
        assert not bool(mask.all()), "the rows must differ in length"
        for row, real in zip(ids, mask.bool(), strict=True):
            one = {"input_ids": row[real][None], "attention_mask": torch.ones(1, int(real.sum()))}
            with torch.no_grad():
                expected.append(trainer.model[0](one)["token_embeddings"][0].mean(0))
        return original(batch)

    objective.loss = loss  # type: ignore[method-assign]
    adapt(trainer, objective, target_dataset=sentence_pairs(30)).train()
    torch.testing.assert_close(torch.cat(seen), torch.stack(expected), rtol=1e-4, atol=1e-5)
