"""Datasets as scripts have them: every kind of source with every kind of target, raw columns too.

Each pairing trains on what the plain Trainer would be given, or is refused with advice that works.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from hf_adapt import MMD, AdaptationCallback, adapt
from hf_adapt.engine.streams import Stream
from hf_adapt.unfreezing import GradualUnfreezing
from tests.helpers import toy
from tests.helpers.data import MapStyle, RowStream, collate, rows
from tests.helpers.models import bert, llama
from tests.helpers.trainers import arguments

KINDS: dict[str, Any] = {
    "dataset": lambda data: data,
    "list": lambda data: data.to_list(),
    "torch": MapStyle,
    "stream": lambda data: data.to_iterable_dataset(),
    "mapped stream": lambda data: data.to_iterable_dataset().map(dict),  # of unknown columns
    "torch stream": RowStream,
}


def with_text(data: datasets.Dataset) -> datasets.Dataset:
    return data.add_column("text", [f"row {i}" for i in range(len(data))])


SOURCE, TARGET = rows(12, 1), rows(9, 2, labels=None)


def trained(source: Any, target: Any, folder: Path, **settings: Any) -> Trainer:
    trainer = Trainer(
        bert(),
        arguments(folder, max_steps=2),
        train_dataset=source,
        data_collator=collate,
        callbacks=[AdaptationCallback(MMD(), target_dataset=target, **settings)],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_every_pairing_with_raw_columns_on_either_side(
    source: str, target: str, tmp_path: Path
) -> None:
    make, other = KINDS[source], KINDS[target]
    refused = "stream" in target and "stream" not in source
    for own, theirs in ((with_text(SOURCE), TARGET), (SOURCE, with_text(TARGET))):
        if refused:
            with pytest.raises(ValueError, match=r"Dataset\.from_list\(list\(itertools\.islice"):
                trained(make(own), other(theirs), tmp_path)
            # What the message advises.
            rows_of_it = list(itertools.islice(other(theirs), 10_000))
            trainer = trained(make(own), datasets.Dataset.from_list(rows_of_it), tmp_path)
        else:
            trainer = trained(make(own), other(theirs), tmp_path)
        assert trainer.state.log_history[0]["loss/mmd"] != 0


def texts(seed: int) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"text": text} for text in toy.sentences(12, seed)])


@pytest.mark.parametrize("target", ["dataset", "stream", "mapped stream"])
@pytest.mark.parametrize("source", ["dataset", "stream", "mapped stream"])
def test_raw_text_for_sft_in_every_pairing(source: str, target: str, tmp_path: Path) -> None:
    def train(given: Any) -> SFTTrainer:
        tokenizer = toy.tokenizer()
        tokenizer.eos_token = "[SEP]"
        trainer = SFTTrainer(
            llama(),
            SFTConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                report_to=[],
                bf16=False,
                gradient_checkpointing=False,
                max_steps=2,
                logging_steps=1,
                save_strategy="no",
                per_device_train_batch_size=4,
            ),
            train_dataset=KINDS[source](texts(1)),
            processing_class=tokenizer,
            callbacks=[AdaptationCallback(MMD(), target_dataset=given)],
        )
        trainer.train()
        return trainer

    given = KINDS[target](texts(2))
    if "stream" in target and "stream" not in source:
        with pytest.raises(ValueError, match="A map-style train_dataset is paired"):
            train(given)
        given = datasets.Dataset.from_list(list(itertools.islice(given, 10_000)))
    assert train(given).state.log_history[0]["loss/mmd"] != 0


def test_transforms_on_the_fly_are_compared_by_what_they_give(tmp_path: Path) -> None:
    """The stored columns have other names in the source than in the target."""

    def tokenised(data: datasets.Dataset, stored: str) -> datasets.Dataset:
        plain = data.to_list()
        numbers = datasets.Dataset.from_dict({stored: range(len(plain))})
        return numbers.with_transform(
            lambda batch: {key: [plain[i][key] for i in batch[stored]] for key in plain[0]}
        )

    for source, target in (
        (tokenised(SOURCE, "image"), tokenised(TARGET, "picture")),
        (SOURCE, tokenised(TARGET, "picture")),
        (tokenised(SOURCE, "image"), TARGET),
    ):
        trainer = Trainer(
            bert(),
            arguments(tmp_path, remove_unused_columns=False),
            train_dataset=source,
            data_collator=collate,
            callbacks=[AdaptationCallback(MMD(), target_dataset=target)],
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss/mmd"] != 0


RAW = datasets.Dataset.from_list([{"text": "a b"}, {"text": "c"}])


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        (
            datasets.DatasetDict({"train": TARGET, "test": TARGET}),
            ValueError,
            r"splits train, test.*target_dataset=dataset\['train'\]",
        ),
        ([datasets.DatasetDict({"test": TARGET})], ValueError, "splits test"),
        ("laptop.csv", TypeError, "'laptop.csv' is a str.*load_dataset"),
        (["good film", "bad film"], TypeError, "'good film' is a str"),
        (Path("laptop.csv"), TypeError, "Path, expected a dataset"),
        (pd.DataFrame({"text": ["a"]}), TypeError, "from_pandas"),
        (iter(TARGET), TypeError, "again and again"),
        ({"input_ids": [[1, 2], [3]]}, TypeError, "of columns .input_ids.*from_dict"),
        ({}, TypeError, "of columns .none"),
        (torch.zeros(3, 2), TypeError, "Tensor, expected a dataset"),
        (DataLoader(TARGET), TypeError, "DataLoader, expected a dataset"),
    ],
    ids=[
        "splits",
        "list of splits",
        "path",
        "texts",
        "Path",
        "frame",
        "iterator",
        "columns",
        "empty",
        "tensor",
        "loader",
    ],
)
def test_what_is_no_dataset_is_refused_at_once(
    target: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        AdaptationCallback(MMD(), target_dataset=target)


@pytest.mark.parametrize("kind", ["dataset", "list", "torch", "stream", "torch stream"])
def test_a_target_that_was_not_tokenised_is_said_so(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target_dataset lacks the column\(s\) 'input_ids'"):
        source = SOURCE.to_iterable_dataset() if "stream" in kind else SOURCE
        trained(source, KINDS[kind](RAW), tmp_path)


@pytest.mark.parametrize("values", [["source", None], [0.0, float("nan")]], ids=["None", "NaN"])
@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_a_row_without_a_domain_is_refused(kind: str, values: Any, tmp_path: Path) -> None:
    data = SOURCE.add_column("domain", [values[i == 7] for i in range(len(SOURCE))])
    with pytest.raises(ValueError, match=r"(Row 7|A row) of train_dataset has (None|nan)"):
        trained(KINDS[kind](data), None, tmp_path)


def test_a_target_without_an_adaptation_that_uses_it_is_refused() -> None:
    with pytest.raises(ValueError, match="without an adaptation that uses it"):
        AdaptationCallback(GradualUnfreezing(), target_dataset=TARGET)


# ---- target rows that fail for another reason, and targets without effect ----


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_target_rows_of_another_tokenizer_are_not_blamed_on_labels(
    forward: Any, tmp_path: Path
) -> None:
    target = rows(9, 2, labels=None, low=70, high=90)  # beyond the model's vocabulary
    with pytest.raises(IndexError) as error:
        trained(SOURCE, Stream(target, forward=forward), tmp_path)
    assert "rows of the target_dataset" in "".join(error.value.__notes__)


def test_running_out_of_memory_is_left_to_auto_find_batch_size(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if len(labels) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    trainer = Trainer(
        bert(),
        arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4),
        train_dataset=SOURCE,
        data_collator=collate,
        compute_loss_func=loss,
        callbacks=[AdaptationCallback(MMD(), target_dataset=TARGET)],
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_target_that_can_have_no_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would have no effect"):
        AdaptationCallback(GradualUnfreezing(), target_dataset=TARGET)
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=SOURCE, data_collator=collate)
    adapt(trainer, MMD(), target_dataset=Stream(TARGET, ratio=0.05))
    with pytest.raises(ValueError, match="not even one target row"):
        trainer.train()


@pytest.mark.parametrize("kind", ["list", "torch", "mapped stream"])
def test_a_domain_column_in_any_kind_of_dataset(kind: str, tmp_path: Path) -> None:
    data = SOURCE.add_column("domain", ["source", "mail"] * 6)
    trainer = trained(KINDS[kind](data), None, tmp_path)
    assert trainer.state.log_history[0]["loss/mmd"] != 0


def test_a_shuffled_stream_is_not_read_beforehand(tmp_path: Path) -> None:
    reads = []

    def many(seed: int) -> Iterator[Any]:
        for row in rows(40, seed):
            reads.append(seed)
            yield row

    streams = [
        datasets.IterableDataset.from_generator(many, gen_kwargs={"seed": seed})
        .shuffle(buffer_size=30, seed=0)
        .map(dict)
        for seed in (1, 2)
    ]
    reads.clear()
    trained(*streams, tmp_path)
    assert len(reads) < 2 * 40 + 2


def test_a_trainer_is_not_known_by_its_name_alone(tmp_path: Path) -> None:
    class RewardTrainer(Trainer):
        """An author's own, which is not TRL's."""

    trainer = RewardTrainer(
        bert(), arguments(tmp_path), train_dataset=SOURCE, data_collator=collate
    )
    adapt(trainer, MMD(), target_dataset=TARGET).train()
    assert trainer.state.log_history[0]["loss/mmd"] != 0
