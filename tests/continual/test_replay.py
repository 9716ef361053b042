"""Replay: a loop written by hand, the memory's rows, and what is refused."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, ViTConfig, ViTForImageClassification

from hf_adapt import AdaptationCallback, adapt
from hf_adapt.continual import DarkReplay, KeepPredictions, Replay, ReplayMemory
from hf_adapt.continual.row_choice import LOGITS, row_hash, shares
from hf_adapt.continual.row_outputs import row_outputs
from tests.helpers.data import MapStyle, RowStream, collate, rows
from tests.helpers.models import bert, llama
from tests.helpers.trainers import GradientRecorder, arguments, same_bits, weights


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    patches = dict(image_size=4, patch_size=2, num_channels=1, num_labels=3)
    return ViTForImageClassification(ViTConfig(**size, **patches))


def trainer_in(folder: Path, model: Any = None, train: Any = None, **settings: Any) -> Trainer:
    return Trainer(
        bert() if model is None else model,
        arguments(folder, **settings),
        train_dataset=rows(8, 1) if train is None else train,
        data_collator=collate,
    )


def gradient_of(model: Any, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    flat = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(model.parameters(), found, strict=True)
    ]
    return torch.cat([each.double().flatten() for each in flat])


def loss_on(model: Any, data: datasets.Dataset) -> torch.Tensor:
    batch = collate(list(data))
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten(), ignore_index=-100)


# ---- the loss ----


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)])
@pytest.mark.parametrize("labels", ["row", "token"])
def test_memory_of_the_old_data_trains_on_both(
    labels: str, sizes: tuple[int, int], tmp_path: Path
) -> None:
    """With a ratio of 1 and all old rows; token labels are ragged, and each mean is its own."""
    model, new, old = (
        bert("token" if labels == "token" else "sequence"),
        *(rows(8, seed, labels, low=low) for seed, low in ((1, 5), (2, 30))),
    )
    wanted = gradient_of(model, loss_on(model, new) + 0.7 * loss_on(model, old))
    recorder = GradientRecorder()
    trainer = trainer_in(
        tmp_path,
        model,
        new,
        per_device_train_batch_size=sizes[0],
        gradient_accumulation_steps=sizes[1],
        max_steps=1,
        max_grad_norm=0,
    )
    trainer.add_callback(recorder)
    trainer.add_callback(AdaptationCallback(Replay(old, ratio=1.0, weight=0.7)))
    trainer.train()
    torch.testing.assert_close(recorder.gradients[0], wanted, rtol=1e-5, atol=1e-8)
    entry = trainer.state.log_history[0]
    assert {"loss/task", "loss/replay"} <= entry.keys()


def test_der_in_one_forward_is_three(tmp_path: Path) -> None:
    model, new, old = bert(), rows(8, 1), rows(8, 2, low=30)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    predicted = model(**{k: v for k, v in collate(list(old)).items() if k != "labels"}).logits
    distance = (predicted - logits).square().sum(1).mean()
    wanted = gradient_of(model, loss_on(model, new) + 0.5 * loss_on(model, old) + 0.2 * distance)
    recorder, calls = GradientRecorder(), []
    trainer = trainer_in(
        tmp_path, model, new, per_device_train_batch_size=8, max_steps=1, max_grad_norm=0
    )
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.add_callback(recorder)
    memory = old.add_column(LOGITS, logits.tolist())
    adapt(trainer, DarkReplay(memory, ratio=1.0, weight=0.5, logits_weight=0.2)).train()
    torch.testing.assert_close(recorder.gradients[0], wanted, rtol=1e-5, atol=1e-8)
    assert sum(calls) == 2, "one for the new rows and one for those of the memory"


def test_weight_zero_is_the_plain_trainer(tmp_path: Path) -> None:
    finals = []
    for adaptation in (None, Replay(rows(5, 2), weight=0.0)):
        trainer = trainer_in(tmp_path, bert(dropout=True))
        (trainer if adaptation is None else adapt(trainer, adaptation)).train()
        finals.append(weights(trainer.model))
    assert same_bits(*finals)


def test_rows_of_a_language_model(tmp_path: Path) -> None:
    new, general = rows(8, 1, "lm"), rows(4, 2, "lm", low=30)
    memory = ReplayMemory.from_dataset(general, 3)
    trainer = adapt(trainer_in(tmp_path, llama(), new), Replay(memory, ratio=0.25))
    trainer.train()
    assert trainer.state.log_history[0]["loss/replay"] > 1


# ---- which rows ----


def places(memory: ReplayMemory, whole: datasets.Dataset) -> set[int]:
    number = {row_hash(row): place for place, row in enumerate(whole)}
    return {
        number[row_hash({k: v for k, v in row.items() if k != LOGITS})] for row in memory.dataset
    }


def numbered(size: int, classes: int = 2) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"input_ids": [i, i], "labels": i % classes} for i in range(size)]
    )


@pytest.mark.parametrize("policy", ["random", "balanced"])
def test_the_order_and_the_parts_do_not_matter(policy: Any) -> None:
    whole = numbered(60, 3)
    memory = ReplayMemory.from_dataset(whole, 10, policy)
    backwards = ReplayMemory.from_dataset(whole.select(range(59, -1, -1)), 10, policy)
    halves = [
        ReplayMemory.from_dataset(whole.shard(2, part, contiguous=False), 10, policy)
        for part in range(2)
    ]
    chosen = places(memory, whole)
    assert chosen == places(backwards, whole) == places(ReplayMemory.merge(halves, 10), whole)
    assert places(memory.smaller(4), whole) <= chosen
    assert chosen != places(ReplayMemory.from_dataset(whole, 10, policy, seed=1), whole)


def test_every_row_is_as_likely() -> None:
    whole, counts = numbered(20), torch.zeros(20)
    for seed in range(400):
        counts[list(places(ReplayMemory.from_dataset(whole, 5, seed=seed), whole))] += 1
    assert counts.sum() == 5 * 400
    assert float((counts / 400 - 0.25).abs().max()) < 0.09, "4 standard deviations"


def test_classes_and_tasks_share_the_size() -> None:
    rare = datasets.concatenate_datasets(
        [numbered(40, 1), numbered(3, 1).map(lambda r: {"labels": 1})]
    )
    memory = ReplayMemory.from_dataset(rare, 10, "balanced", task="first")
    assert sorted(memory.classes) == ["0"] * 7 + ["1"] * 3
    second = ReplayMemory.from_dataset(numbered(50, 2), 10, "balanced", task="second")
    both = ReplayMemory.merge([memory, second], 10)
    assert sorted(both.tasks) == ["first"] * 5 + ["second"] * 5
    assert shares([2, 0, 9], 20) == [2, 0, 9]


def test_herding_and_surprise_ask_the_model(tmp_path: Path) -> None:
    model, old = bert(), rows(14, 3)
    trainer = trainer_in(tmp_path, model, per_device_eval_batch_size=4)
    batch = collate(list(old))
    with torch.no_grad():
        outputs = model.eval()(**batch, output_hidden_states=True)
    losses = F.cross_entropy(outputs.logits, batch["labels"], reduction="none")
    torch.testing.assert_close(row_outputs(trainer, old, "losses")[:, 0], losses)
    memory = ReplayMemory.from_dataset(old, 4, "surprise", trainer=trainer)
    assert places(memory, old) == set(losses.topk(4).indices.tolist())
    mask = batch["attention_mask"][..., None]
    features = ((outputs.hidden_states[-1] * mask).sum(1) / mask.sum(1)).double()
    herded = ReplayMemory.from_dataset(old, 3, "herding", trainer=trainer)
    for label in range(3):
        members = (batch["labels"] == label).nonzero().flatten()
        mean = features[members].mean(0)
        nearest = int(members[(features[members] - mean).norm(dim=1).argmin()])
        assert nearest in places(herded, old)
    stored = ReplayMemory.from_dataset(old, 4, trainer=trainer, logits=True)
    number = {row_hash(row): place for place, row in enumerate(old)}
    kept = [number[content] for content in stored.hashes]
    torch.testing.assert_close(torch.tensor(stored.dataset[LOGITS]), outputs.logits[kept])


def test_surprise_of_a_regression_is_its_distance(tmp_path: Path) -> None:
    model = bert(num_labels=2, problem_type="regression")
    old = rows(8, 3, None).add_column("labels", [[float(i), -float(i)] for i in range(8)])

    def collated(features: Any) -> Any:
        batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in features])
        return {**batch, "labels": torch.tensor([row["labels"] for row in features])}

    trainer = trainer_in(tmp_path, model, old)
    trainer.data_collator = collated
    found = row_outputs(trainer, old, "losses")[:, 0]
    assert found.argsort().tolist() == list(range(8))


def test_losses_of_token_heads_are_means_over_their_labels(tmp_path: Path) -> None:
    model, old = bert("token"), rows(5, 3, "token")
    found = row_outputs(trainer_in(tmp_path, model, old), old, "losses")[:, 0]
    with torch.no_grad():
        wanted = torch.stack([loss_on(model.eval(), old.select([i])) for i in range(5)])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", [MapStyle, list, RowStream, datasets.Dataset.to_iterable_dataset])
def test_rows_of_every_kind_of_data_set(kind: Any) -> None:
    whole = rows(30, 3)
    memory = ReplayMemory.from_dataset(kind(whole), 6)
    assert memory.fingerprint == ReplayMemory.from_dataset(whole, 6).fingerprint


def test_equal_rows_of_a_stream_are_taken_once() -> None:
    whole = datasets.concatenate_datasets([rows(40, 1), rows(1, 9), rows(1, 9), rows(1, 9)])
    for seed in range(12):
        memory = ReplayMemory.from_dataset(whole.to_iterable_dataset(), 10, seed=seed)
        assert len(memory) == 10
        assert memory.dataset.to_list() == (
            ReplayMemory.from_dataset(whole, 10, seed=seed).dataset.to_list()
        )


def test_rows_that_are_transformed_as_they_are_read(tmp_path: Path) -> None:
    """The usual image script: the transform makes labels of another column."""

    def transform(batch: Any) -> Any:
        pixels = [torch.full((1, 4, 4), float(value)) for value in batch["value"]]
        return {"pixel_values": pixels, "labels": batch["label"]}

    def images(first: int) -> datasets.Dataset:
        columns = {"value": list(range(first, first + 12)), "label": [i % 3 for i in range(12)]}
        return datasets.Dataset.from_dict(columns).with_transform(transform)

    trainer = Trainer(
        vit(), arguments(tmp_path, remove_unused_columns=False), train_dataset=images(0)
    )
    adapt(trainer, Replay(ReplayMemory.from_dataset(images(50), 6), ratio=1.0)).train()
    assert trainer.state.log_history[0]["loss/replay"] > 0


# ---- several memories, and rows without labels ----


def test_memories_of_several_tasks_with_heads_of_several_sizes(tmp_path: Path) -> None:
    """Each row is compared over the classes that its model had."""
    model, new = bert(num_labels=5), rows(8, 1)
    memories = [
        ReplayMemory.from_dataset(
            rows(4, seed), 4, task=str(seed), trainer=trainer_in(tmp_path, other), logits=True
        )
        for seed, other in ((2, bert(seed=2)), (3, bert(num_labels=5, seed=3)))
    ]
    memory = ReplayMemory.merge(memories)
    data = list(memory.dataset)
    logits = model(**{k: v for k, v in collate(data).items() if k != "labels"}).logits
    distance = sum(
        (own[: len(row[LOGITS])] - torch.tensor(row[LOGITS])).square().sum()
        for own, row in zip(logits, data, strict=True)
    )
    wanted = gradient_of(model, loss_on(model, new) + 0.2 * distance / 8)
    recorder = GradientRecorder()
    settings = {"per_device_train_batch_size": 8, "max_steps": 1, "max_grad_norm": 0}
    trainer = trainer_in(tmp_path, model, new, **settings)
    trainer.add_callback(recorder)
    adapt(trainer, DarkReplay(memory, ratio=1.0, weight=0.0)).train()
    torch.testing.assert_close(recorder.gradients[0], wanted, rtol=1e-5, atol=1e-8)


def test_logits_need_no_labels(tmp_path: Path) -> None:
    unlabelled = ReplayMemory.from_dataset(
        rows(8, 2, None), 6, trainer=trainer_in(tmp_path), logits=True
    )
    trainer = adapt(trainer_in(tmp_path), DarkReplay(unlabelled, weight=0.0))
    trainer.train()
    assert trainer.state.log_history[-2]["loss/dark_replay"] > 0
    assert "loss/replay" not in trainer.state.log_history[0]


def test_two_memories_side_by_side(tmp_path: Path) -> None:
    one, other = (ReplayMemory.from_dataset(rows(20, seed), 6) for seed in (2, 3))
    trainer = trainer_in(tmp_path, save_strategy="steps", save_steps=3)
    adapt(trainer, Replay(one, ratio=1.0), Replay(other, ratio=1.0, weight=0.1, name="general"))
    trainer.train()
    entry = trainer.state.log_history[0]
    total = entry["loss/task"] + entry["loss/replay"] + 0.1 * entry["loss/general"]
    assert entry["loss"] == pytest.approx(total, rel=1e-4)
    for folder, memory in (("replay_memory", one), ("replay_memory_general", other)):
        stored = ReplayMemory.load(tmp_path / "checkpoint-3" / folder, memory.dataset)
        assert stored.fingerprint == memory.fingerprint
    with pytest.raises(ValueError, match="give one of them another name="):
        adapt(trainer_in(tmp_path), Replay(one), DarkReplay(other)).train()


def test_a_memory_is_a_data_set(tmp_path: Path) -> None:
    memory = ReplayMemory.from_dataset(rows(20, 2), 6)
    trainer = trainer_in(tmp_path)
    adapt(trainer, KeepPredictions(on="replay"), streams={"replay": memory}).train()
    assert trainer.state.log_history[-2]["loss/keep_predictions"] > 0


# ---- on disk ----


def test_a_memory_with_logits_is_found_again_without_its_rows(tmp_path: Path) -> None:
    old = rows(20, 3)
    memory = ReplayMemory.from_dataset(old, 6, trainer=trainer_in(tmp_path), logits=True)

    def run(memory: ReplayMemory, resume: Any = None) -> Any:
        trainer = trainer_in(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=3)
        adapt(trainer, DarkReplay(memory, ratio=1.0)).train(resume_from_checkpoint=resume)
        return weights(trainer.model)

    whole, checkpoint = run(memory), tmp_path / "run" / "checkpoint-2"
    shuffled = ReplayMemory.load(checkpoint / "replay_memory", old.select(range(19, -1, -1)))
    assert same_bits(whole, run(shuffled, str(checkpoint)))


def test_a_memory_that_has_grown_in_its_folder_can_still_be_read(tmp_path: Path) -> None:
    ReplayMemory.from_dataset(rows(20, 2), 6).save(tmp_path)
    grown = ReplayMemory.merge(
        [ReplayMemory.load(tmp_path), ReplayMemory.from_dataset(rows(20, 3), 6)]
    )
    grown.save(tmp_path)
    assert pickle.loads(pickle.dumps(grown.dataset)).to_list() == grown.dataset.to_list()
    assert len(ReplayMemory.load(tmp_path)) == 12


def test_a_saved_memory_is_read_again(tmp_path: Path) -> None:
    whole = numbered(30, 3)
    memory = ReplayMemory.from_dataset(whole, 6, "balanced", task="a")
    for folder, keeps_rows in ((tmp_path / "rows", True), (tmp_path / "hashes", False)):
        for _ in range(2):  # a later checkpoint replaces an earlier one
            memory.save(folder, rows=keeps_rows)
        again = ReplayMemory.load(folder, None if keeps_rows else whole)
        assert again.dataset.to_list() == memory.dataset.to_list()
        assert (again.ranks, again.tasks, again.classes) == (
            memory.ranks,
            memory.tasks,
            memory.classes,
        )
    assert not list((tmp_path / "hashes").glob("rows*"))
    with pytest.raises(ValueError, match="saved without its rows"):
        ReplayMemory.load(tmp_path / "hashes")
    with pytest.raises(ValueError, match="6 of 6 rows of the memory"):
        ReplayMemory.load(tmp_path / "hashes", numbered(0 + 30, 2).map(lambda r: {"labels": 9}))
    with pytest.raises(FileNotFoundError, match=r"memory\.json"):
        ReplayMemory.load(tmp_path)


def test_saving_again_replaces_all_of_it(tmp_path: Path) -> None:
    """Other rows, another order, logits, or no rows any more."""
    whole = numbered(30, 3)
    memory = ReplayMemory.from_dataset(whole, 6, "balanced")
    backwards = ReplayMemory.from_dataset(whole.select(range(29, -1, -1)), 6, "balanced")
    with_logits = replace(memory, dataset=memory.dataset.add_column(LOGITS, [[0.5, 1.0]] * 6))
    for each in (memory, backwards, with_logits):
        each.save(tmp_path)
        again = ReplayMemory.load(tmp_path)
        assert again.fingerprint == each.fingerprint
        assert [row_hash(row) for row in again.dataset] == again.hashes
        assert again.dataset.column_names == each.dataset.column_names
    assert with_logits.fingerprint != memory.fingerprint
    again.save(tmp_path, rows=False)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]
    transformed = replace(memory, dataset=memory.dataset.with_transform(lambda batch: batch))
    transformed.save(tmp_path)
    assert len(ReplayMemory.load(tmp_path)) == 6


def test_overlapping_memories_have_each_row_once() -> None:
    whole = numbered(30, 3)
    one, other = (ReplayMemory.from_dataset(whole.select(range(n, n + 20)), 20) for n in (0, 10))
    assert len(ReplayMemory.merge([one, other])) == 30
    assert len(ReplayMemory.from_dataset(datasets.concatenate_datasets([whole] * 3), 90)) == 30
    named_rows = whole.cast_column("labels", datasets.ClassLabel(names=["a", "b", "c"]))
    with pytest.raises(ValueError, match="have different types"):
        ReplayMemory.merge([one, ReplayMemory.from_dataset(named_rows, 5)])
    assert shares([1, 3, 3], 5) == [1, 2, 2]


def test_images_are_told_by_their_bytes(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        PIL.Image.new("L", (2, 2), color=number).save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    memory = ReplayMemory.from_dataset(images, 2)
    memory.save(tmp_path / "memory")
    again = ReplayMemory.load(tmp_path / "memory")
    assert ReplayMemory.from_dataset(again.dataset, 2).fingerprint == memory.fingerprint
    memory.save(tmp_path / "memory", rows=False)
    assert len(ReplayMemory.load(tmp_path / "memory", images)) == 2


def test_steps_without_a_row_of_the_memory(tmp_path: Path, caplog: Any) -> None:
    """A small ratio: what is logged is the mean over the steps that have one."""
    trainer = trainer_in(tmp_path, learning_rate=0.0, max_steps=6, logging_steps=6)
    memory = rows(1, 2, low=30)
    adapt(trainer, Replay(memory, ratio=0.13)).train()
    loss = loss_on(bert(), memory).item()
    assert trainer.state.log_history[0]["loss/replay"] == pytest.approx(loss, rel=1e-4)
    assert "so some steps have none" in caplog.text


def test_another_memory_is_refused_on_resume(tmp_path: Path) -> None:
    def run(seed: int, resume: Any = None) -> None:
        memory = ReplayMemory.from_dataset(rows(20, 3), 5, seed=seed)
        trainer = trainer_in(tmp_path, save_strategy="steps", save_steps=2, max_steps=3)
        adapt(trainer, Replay(memory, keep="rows")).train(resume_from_checkpoint=resume)

    run(0)
    checkpoint = tmp_path / "checkpoint-2"
    assert len(ReplayMemory.load(checkpoint / "replay_memory")) == 5
    run(0, str(checkpoint))
    with pytest.raises(ValueError, match="other rows than in the run that is resumed"):
        run(1, str(checkpoint))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0 must be a whole number"),
        ({"size": 3, "policy": "best"}, "policy='best' is unknown"),
        ({"size": 3, "policy": "herding"}, "asks the model that knows the task"),
        ({"size": 3, "logits": True}, "logits=True asks the model"),
        ({"size": 3, "policy": "balanced", "by": "genre"}, "'genre' among input_ids"),
    ],
)
def test_memories_that_cannot_be_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayMemory.from_dataset(numbered(5), **options)


def test_rows_that_cannot_be_remembered() -> None:
    with pytest.raises(ValueError, match="the old data set is empty"):
        ReplayMemory.from_dataset(numbered(5).select([]), 3)
    with pytest.raises(ValueError, match="The memory is empty"):
        Replay(numbered(5).select([]))
    with pytest.raises(TypeError, match="make a memory of each"):
        ReplayMemory.from_dataset({"a": numbered(5)}, 3)
    with pytest.raises(ValueError, match="is a stream"):
        ReplayMemory.from_dataset(RowStream(rows(5, 1)), 3, "balanced")
    with pytest.raises(TypeError, match="rows with named columns"):
        ReplayMemory.from_dataset([(1, 2), (3, 4)], 1)
    with pytest.raises(ValueError, match="keep='all' is unknown"):
        Replay(numbered(5), keep="all")
    memories = [ReplayMemory.from_dataset(numbered(5), 3, seed=seed) for seed in (0, 1)]
    with pytest.raises(TypeError, match="takes one memory"):
        Replay(memories)
    with pytest.raises(TypeError, match="expected a memory"):
        Replay(None)
    with pytest.raises(ValueError, match="different policies cannot be compared"):
        ReplayMemory.merge(memories)


def test_folders_that_hold_no_memory(tmp_path: Path) -> None:
    for text in ("{", "{}", "[]"):
        (tmp_path / "memory.json").write_text(text)
        with pytest.raises(ValueError, match=r"memory\.json is no memory"):
            ReplayMemory.load(tmp_path)
    ReplayMemory.from_dataset(numbered(5), 3).save(tmp_path)
    shutil.rmtree(next(tmp_path.glob("rows-*")))
    with pytest.raises(FileNotFoundError, match="the rows of the memory, is missing"):
        ReplayMemory.load(tmp_path)
    assert len(ReplayMemory.load(tmp_path, numbered(5))) == 3


LABELS = datasets.ClassLabel(names=["bad", "good", "fair"])
OTHERS = datasets.ClassLabel(names=["ham", "spam", "fair"])


def named(data: datasets.Dataset, kind: datasets.ClassLabel) -> datasets.Dataset:
    return data.cast_column("labels", kind)


@pytest.mark.parametrize(
    ("train", "memory", "message"),
    [
        (rows(8, 1), rows(5, 2, None), "has none of the label columns"),
        (rows(8, 1), rows(5, 2).rename_column("input_ids", "ids"), "lacks the column"),
        (rows(8, 1), rows(5, 2).map(lambda r: {"labels": 7}), "has the label 7"),
        (rows(8, 1), rows(5, 2, "token"), "one of them is of rows"),
        (rows(8, 1), list(rows(5, 2).map(lambda r: {"labels": 7})), "has the label 7"),
        (rows(8, 1), rows(5, 2).map(lambda r: {"labels": -1}), "has the label -1"),
        (named(rows(8, 1), LABELS), named(rows(5, 2), OTHERS), "would mean another class"),
        (rows(8, 1), rows(5, 2).cast_column("labels", datasets.Value("float32")), "measured value"),
    ],
)
def test_memories_that_do_not_fit(train: Any, memory: Any, message: str, tmp_path: Path) -> None:
    trainer = adapt(trainer_in(tmp_path, train=train), Replay(memory))
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert same_bits(before, weights(trainer.model))


def test_logits_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have no column 'replay_logits'"):
        adapt(trainer_in(tmp_path), DarkReplay(rows(5, 2))).train()
    token = trainer_in(tmp_path, bert("token"), rows(8, 1, "token"))
    with pytest.raises(ValueError, match="one vector for each row"):
        ReplayMemory.from_dataset(rows(5, 2, "token"), 3, trainer=token, logits=True)
    wide = rows(5, 2).add_column(LOGITS, [[0.0] * 4] * 5)
    with pytest.raises(ValueError, match="logits are of 4 classes"):
        adapt(trainer_in(tmp_path), DarkReplay(wide, ratio=1.0)).train()
