"""Several streams beside the training rows: who sees their rows, and who learns their labels."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer

from hf_adapt import MMD, Distillation, Objective, adapt
from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.engine.pairing import PairedDataset, StreamRows
from hf_adapt.engine.stream_data import _check_dispatch
from hf_adapt.engine.streams import Stream
from tests.helpers.data import RowStream, collate, rows
from tests.helpers.models import FIVE, bert, llama
from tests.helpers.trainers import GradientRecorder, arguments, cosine_and_ratio, flat_gradient

HEADS = {"sequence": "row", "token": "token", "lm": "lm"}


def model_of(head: str) -> Any:
    return llama() if head == "lm" else bert(head)


def trained(
    folder: Path, head: str, *adaptations: Any, size: int = 8, **settings: Any
) -> tuple[Trainer, torch.Tensor]:
    """One optimizer step over eight training rows, and its gradient."""
    recorder, given = GradientRecorder(), settings.pop("given", {})
    trainer = Trainer(
        model_of(head),
        arguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_grad_norm=0.0,
            **settings,
        ),
        train_dataset=rows(8, 1, HEADS[head]),
        data_collator=collate,
        callbacks=[recorder],
    )
    adapt(trainer, *adaptations, **given)
    trainer.train()
    return trainer, recorder.gradients[0]


def mean_loss(model: Any, head: str, data: Any) -> torch.Tensor:
    """The mean of the cross-entropy over all labels of these rows."""
    batch = collate(list(data))
    logits, labels = model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]
    if head == "lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [8, 2])
def test_a_labelled_stream_has_a_loss_of_its_own(head: str, size: int, tmp_path: Path) -> None:
    """L = L_train + 0.7 L_memory, each a mean over its own labels of the whole step."""
    memory = rows(4, 2, HEADS[head])
    stream = Stream(memory, ratio=0.5, labels="keep", weight=0.7)
    trainer, gradient = trained(tmp_path, head, given={"streams": {"memory": stream}}, size=size)
    model = model_of(head)
    data = rows(8, 1, HEADS[head])
    loss, own = mean_loss(model, head, data), mean_loss(model, head, memory)
    if head == "lm" and not FIVE:  # the Trainer of 4.57 counts first tokens, which none predicts
        tokens = sum(len(row["labels"]) for row in data)
        loss = loss * ((tokens - len(data)) / tokens)
    (loss + 0.7 * own).backward()
    assert cosine_and_ratio(gradient, flat_gradient(model)) == pytest.approx((1, 1), abs=1e-5)
    log = trainer.state.log_history[0]
    assert log["loss/task"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["loss/memory"] == pytest.approx(own.item(), rel=1e-5)


class Watching(Objective):
    """Writes down which rows it sees."""

    def __init__(self, name: str, streams: tuple[str, ...]) -> None:
        super().__init__(weight=0.1, name=name)
        self.streams = streams
        self.seen: list[Any] = []

    def loss(self, batch: Any) -> torch.Tensor:
        features, domain = batch.features()
        logits, same = batch.logits()
        assert torch.equal(domain, same) and len(features) == len(logits) == len(batch.domain)
        labels = batch.labels()
        if torch.is_grad_enabled():
            counts = torch.bincount(domain, minlength=batch.num_domains).tolist()
            memory = int(batch.is_in(domain, "memory").sum())
            known = [int((labels[domain == n] != -100).sum()) for n in range(batch.num_domains)]
            self.seen.append((counts, memory, known))
        return features.square().mean() + logits.square().mean()


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_each_objective_sees_its_streams(forward: Any, tmp_path: Path) -> None:
    none, target = Watching("none", ()), Watching("on_target", ("target",))
    memory, every = Watching("on_memory", ("memory",)), Watching("all", ("target", "memory"))
    trainer, _ = trained(
        tmp_path,
        "sequence",
        *(none, target, memory, every, MMD()),
        given={
            "target_dataset": Stream([rows(9, 2, None), rows(5, 3, None)], forward=forward),
            "streams": {
                "memory": Stream(rows(6, 4), ratio=0.5, labels="keep"),
                "more": Stream(rows(6, 5), ratio=0.25, forward=forward),
            },
        },
    )
    assert none.seen == [([8], 0, [8])]
    assert target.seen == [([8, 4, 4], 0, [8, 0, 0])]
    assert memory.seen == [([8, 4], 4, [8, 4])]
    assert every.seen == [([8, 4, 4, 4], 4, [8, 0, 0, 4])]
    log = trainer.state.log_history[0]
    assert {"loss/memory", "loss/mmd", "mmd/gradient_ratio"} <= log.keys()
    assert "loss/more" not in log, "its labels are hidden"


def test_another_stream_changes_nothing_for_an_objective_that_does_not_see_it(
    tmp_path: Path,
) -> None:
    target = rows(9, 2, None)
    _, alone = trained(tmp_path, "sequence", MMD(), given={"target_dataset": target})
    _, beside = trained(
        tmp_path,
        "sequence",
        MMD(),
        given={"target_dataset": target, "streams": {"more": rows(9, 3)}},
    )
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-7)


class Provider(Adaptation):
    """Brings a stream along."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def provided_streams(self) -> dict[str, Stream]:
        return {"memory": self.stream}


def test_an_adaptation_may_provide_a_stream(tmp_path: Path) -> None:
    stream = Stream(rows(4, 2), labels="keep")
    _, by_name = trained(tmp_path, "sequence", given={"streams": {"memory": stream}})
    _, provided = trained(tmp_path, "sequence", Provider(stream))
    assert torch.equal(by_name, provided)


def test_streams_are_drawn_independently() -> None:
    data = [{"x": i} for i in range(20)]
    streams = [StreamRows([data], 1, 1, "target"), StreamRows([data], 1, 2, "memory")]
    drawn = [row.companions for row in PairedDataset(data, streams, seed=0)]
    target, memory = ([row[i][1]["x"] for row in drawn] for i in range(2))
    assert [d for d, _ in drawn[0]] == [1, 2] and target != memory
    alone = [row.companions[0][1]["x"] for row in PairedDataset(data, streams[:1], seed=0)]
    assert target == alone and sorted(memory) == list(range(20))


def test_a_named_stream_that_is_missing_is_asked_for(tmp_path: Path) -> None:
    needing = Watching("on_memory", ("memory",))
    needing.needs_streams = ("memory",)
    with pytest.raises(ValueError, match=r"needs the stream 'memory'.*streams={'memory': dataset}"):
        trained(tmp_path, "sequence", needing)


def test_streams_that_contradict_each_other(tmp_path: Path) -> None:
    target = rows(9, 2, None)
    callbacks = [
        AdaptationCallback(MMD(), target_dataset=Stream(target, ratio=1)),
        AdaptationCallback(MMD(name="second"), target_dataset=Stream(target, ratio=2)),
    ]
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=rows(8, 1), data_collator=collate)
    for callback in callbacks:
        trainer.add_callback(callback)
    with pytest.raises(ValueError, match="disagree on the ratio of the stream 'target': 1 and 2"):
        trainer.train()
    with pytest.raises(ValueError, match="The target is given twice"):
        AdaptationCallback(MMD(), target_dataset=target, streams={"target": target})
    with pytest.raises(TypeError, match=r"streams\['memory'\] is a DatasetDict|is a str"):
        AdaptationCallback(MMD(), streams={"memory": "rows.csv"})


def test_a_labelled_stream_without_labels_is_refused(tmp_path: Path) -> None:
    stream = Stream(rows(4, 2, None), labels="keep")
    with pytest.raises(ValueError, match="dataset of the stream 'memory' has none of the label"):
        trained(tmp_path, "sequence", given={"streams": {"memory": stream}})


# ---- labels under other names, losses of one's own, columns, torch streams ----


class Named(Trainer):
    """Its labels are called y, so that the Trainer cannot count them."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("y")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def named(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate([{k: v for k, v in row.items() if k != "y"} for row in features])
    return {**batch, "y": torch.tensor([row["y"] for row in features])}


def divided(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def gradients_of_sizes(tmp_path: Path, cls: Any, ratio: float, **options: Any) -> list[Any]:
    found = []
    for size in (8, 1):
        recorder = GradientRecorder()
        trainer = cls(
            bert(),
            arguments(
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                max_grad_norm=0.0,
                **options.get("settings", {}),
            ),
            train_dataset=options["train"],
            data_collator=options.get("collator", collate),
            callbacks=[recorder],
            **options.get("more", {}),
        )
        stream = Stream(options["memory"], ratio=ratio, labels="keep")
        adapt(trainer, streams={"memory": stream}).train()
        found.append((recorder.gradients[0], trainer.state.log_history[0]["loss/memory"]))
    return found


def test_a_sparse_stream_whose_labels_cannot_be_counted(tmp_path: Path) -> None:
    """Most micro-batches have none of its rows: those that have weigh more."""
    (whole, loss), (single, same) = gradients_of_sizes(
        tmp_path,
        Named,
        0.25,
        train=rows(8, 1).rename_column("labels", "y"),
        memory=rows(4, 2).rename_column("labels", "y"),
        collator=named,
        settings=dict(label_names=["y"], remove_unused_columns=False),
    )
    assert cosine_and_ratio(single, whole) == pytest.approx((1, 1), abs=1e-5)
    assert same == pytest.approx(loss, rel=1e-5)


def test_a_loss_function_that_divides_by_the_number_of_items(tmp_path: Path) -> None:
    data = dict(train=rows(8, 1), memory=rows(4, 2), more={"compute_loss_func": divided})
    (whole, loss), (single, same) = gradients_of_sizes(tmp_path, Trainer, 0.5, **data)
    plain = gradients_of_sizes(tmp_path, Trainer, 0.5, **{**data, "more": {}})[0]
    for gradient in (single, plain[0]):
        assert cosine_and_ratio(gradient, whole) == pytest.approx((1, 1), abs=1e-5)
    assert loss == pytest.approx(same, rel=1e-5) == pytest.approx(plain[1], rel=1e-5)


class Seeing(Objective):
    """Writes down the columns beside each part."""

    streams = ("memory",)

    def __init__(self, *columns: str) -> None:
        super().__init__()
        self.columns, self.seen = columns, []

    def loss(self, batch: Any) -> torch.Tensor:
        self.seen = [dict(part.columns) for part in batch.parts]
        return batch.features()[0].sum() * 0.0


def test_columns_of_a_stream_and_of_inputs(tmp_path: Path) -> None:
    memory = rows(8, 2).add_column("old", list(range(8))).add_column("domain", [7] * 8)
    train = rows(8, 1).add_column("domain", [3] * 8)
    seeing, recorder = Seeing("old", "domain", "labels"), GradientRecorder()
    trainer = Trainer(
        bert(), arguments(tmp_path, max_steps=1), train_dataset=train, data_collator=collate
    )
    trainer.add_callback(recorder)
    adapt(trainer, seeing, streams={"memory": Stream(memory, labels="keep")}).train()
    ours, theirs = seeing.seen
    assert ours["old"] == [None] * 4 and set(theirs["old"]) <= set(range(8))
    assert ours["domain"] == [3] * 4 and theirs["domain"] == [7] * 4
    assert set(theirs["labels"]) <= {0, 1, 2}, "and the model was given its labels"
    assert trainer.state.log_history[0]["loss/task"] > 0


def test_a_torch_stream_without_labels_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        bert(),
        arguments(tmp_path),
        train_dataset=RowStream(rows(8, 1)),
        data_collator=collate,
    )
    stream = Stream(RowStream(rows(8, 2, None)), labels="keep")
    adapt(trainer, streams={"memory": stream})
    with pytest.raises(ValueError, match="have none of the label columns 'labels'"):
        trainer.train()


def test_a_fused_term_beside_a_sparse_stream(tmp_path: Path) -> None:
    """The first micro-batch may have none of its rows, and the second one some."""
    teacher = llama(1)
    recorder = GradientRecorder()
    trainer = Trainer(
        llama(),
        arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4),
        train_dataset=rows(12, 1, "lm"),
        data_collator=collate,
        callbacks=[recorder],
    )
    stream = Stream(rows(6, 2, "lm"), ratio=0.3, labels="keep")
    adapt(trainer, Distillation(teacher), streams={"memory": stream}).train()
    assert "loss/memory" in trainer.state.log_history[0] and len(recorder.gradients) == 3


@pytest.mark.parametrize(
    ("stream", "dispatches", "refused"),
    [
        (Stream(rows(4, 2), ratio=0.5, labels="keep"), None, True),
        (Stream(rows(4, 2), ratio=0.5, labels="keep"), False, False),
        (Stream(rows(4, 2), labels="keep"), None, False),
        (Stream(rows(4, 2), ratio=0.5), None, False),
        (Stream(rows(4, 2), ratio=0.3), None, True),
    ],
)
def test_batches_that_the_main_process_would_cut_wrongly_are_refused(
    stream: Stream, dispatches: bool | None, refused: bool
) -> None:
    config = SimpleNamespace(dispatch_batches=dispatches)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2, dataloader_config=config),
        args=SimpleNamespace(per_device_train_batch_size=4),
    )
    with pytest.raises(ValueError, match="'dispatch_batches': False") if refused else nullcontext():
        _check_dispatch(trainer, RowStream(rows(8, 1)), "memory", stream)
