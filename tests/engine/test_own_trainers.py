"""The one-line callback on an author's own Trainer, loader, model and loss."""

from __future__ import annotations

import math
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import (
    BertForTokenClassification,
    Trainer,
)

from hf_adapt import (
    DANN,
    MMD,
    AdaptationCallback,
    DomainAdversarialCallback,
    adapt,
)
from hf_adapt.engine.streams import Stream
from tests.helpers.adaptation import (
    SOURCE,
    TARGET,
    InputRecorder,
    RecordingCollator,
    assert_adapted,
    losses,
    terms,
)
from tests.helpers.data import collate, rows
from tests.helpers.libraries import BATCH
from tests.helpers.models import bert
from tests.helpers.trainers import arguments, flat_gradient

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
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_an_authors_own_loss_sees_what_it_saw(
    cls: type[Trainer], forward: Any, tmp_path: Any
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
                AdaptationCallback(*terms(), target_dataset=Stream(TARGET, forward=forward))
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
    adapt(trainer, *terms(), target_dataset=Stream(TARGET, forward="separate")).train()
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


# ---- forward="separate" ----


def collate_floats(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in features])
    if "labels" in features[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in features], dtype=torch.float32)
    return batch


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_heads_whose_loss_ignores_no_label(problem: str, forward: Any, tmp_path: Any) -> None:
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
            plan = {"target_dataset": Stream(TARGET, forward=forward)}
            trainer.add_callback(AdaptationCallback(DANN(ramp=None), MMD(), **plan))
            if forward == "joint":
                with pytest.raises(ValueError, match="forward='separate'"):
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
    for forward in ("joint", "separate"):
        trainer = FirstGradient(
            model=bert(), args=arguments(tmp_path), train_dataset=SOURCE, data_collator=collate
        )
        objectives = terms()
        adapt(trainer, *objectives, target_dataset=Stream(TARGET, forward=forward)).train()
        assert trainer.first is not None
        gradients.append(trainer.first)
        names = ("loss/task", "loss/dann", "loss/mmd", "loss/information_maximization")
        logged.append([losses(trainer, name)[0] for name in names])
    norm = float(gradients[0].norm())
    assert norm > 1e-2
    assert float((gradients[1] - gradients[0]).norm()) / norm < 1e-6
    assert logged[1] == pytest.approx(logged[0], abs=1e-6)
