"""A tiny student, its data and its collator for every kind of head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import BertForMultipleChoice, ViTForImageClassification

from tests.helpers.data import collate, rows
from tests.helpers.models import MODELS, bert, bert_config, enlarged, llama, vit_config


@dataclass
class Case:
    """What a test needs of a head."""

    model: Callable[[int], Any]
    data: Callable[[int], datasets.Dataset]
    collate: Callable[[Any], dict[str, torch.Tensor]] = collate
    is_language_model: bool = False


def _seeded(make: Callable[[], Any]) -> Callable[[int], Any]:
    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return enlarged(make(), 6.0)

    return model


def _span_rows(number: int) -> datasets.Dataset:
    made = rows(number, 1, None).to_list()
    for index, row in enumerate(made):
        row["start_positions"] = index % 3
        row["end_positions"] = len(row["input_ids"]) - 1
    return datasets.Dataset.from_list(made)


def _span_collate(features: Any) -> dict[str, torch.Tensor]:
    batch = collate([{k: f[k] for k in ("input_ids", "attention_mask")} for f in features])
    for key in ("start_positions", "end_positions"):
        batch[key] = torch.tensor([f[key] for f in features])
    return batch


def _masked_rows(number: int) -> datasets.Dataset:
    made = rows(number, 1, "lm").to_list()
    for index, row in enumerate(made):
        row["labels"] = [x if (i + index) % 3 == 0 else -100 for i, x in enumerate(row["labels"])]
    return datasets.Dataset.from_list(made)


def _target_rows(number: int) -> datasets.Dataset:
    made = rows(number, 1, None).to_list()
    for row, answer in zip(made, rows(number, 2, None).to_list(), strict=True):
        row["labels"] = answer["input_ids"][: 2 + len(answer["input_ids"]) // 2]
    return datasets.Dataset.from_list(made)


def _target_collate(features: Any) -> dict[str, torch.Tensor]:
    batch = collate([{k: f[k] for k in ("input_ids", "attention_mask")} for f in features])
    longest = max(len(f["labels"]) for f in features)
    batch["labels"] = torch.tensor(
        [[*f["labels"], *[-100] * (longest - len(f["labels"]))] for f in features]
    )
    return batch


def _images(number: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(number, 3, 8, 8, generator=generator)
    return datasets.Dataset.from_list(
        [{"pixel_values": p.tolist(), "labels": i % 3} for i, p in enumerate(pixels)]
    )


def _image_collate(features: Any) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.tensor([f["pixel_values"] for f in features]),
        "labels": torch.tensor([f["labels"] for f in features]),
    }


def _several_labels(number: int) -> datasets.Dataset:
    made = rows(number, 1, "row").to_list()
    for row in made:
        row["labels"] = [float(row["labels"] == i) for i in range(3)]
    return datasets.Dataset.from_list(made)


def _several_collate(features: Any) -> dict[str, torch.Tensor]:
    batch = collate([{k: f[k] for k in ("input_ids", "attention_mask")} for f in features])
    batch["labels"] = torch.tensor([f["labels"] for f in features])
    return batch


def _choices(number: int) -> datasets.Dataset:
    made = rows(2 * number, 1, None).to_list()
    pairs = zip(made[::2], made[1::2], strict=True)
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": [a["input_ids"][:4], b["input_ids"][:4]],
                "attention_mask": [[1] * 4, [1] * 4],
                "labels": i % 2,
            }
            for i, (a, b) in enumerate(pairs)
        ]
    )


def _choice_collate(features: Any) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([f[key] for f in features]) for key in features[0]}


CASES = {
    "sequence": Case(_seeded(lambda: bert("sequence", seed=_now())), lambda n: rows(n, 1, "row")),
    "token": Case(_seeded(lambda: bert("token", seed=_now())), lambda n: rows(n, 1, "token")),
    "spans": Case(_seeded(MODELS["bert_answers"]), _span_rows, _span_collate),
    "masked_lm": Case(
        _seeded(MODELS["bert_masked"]),
        _masked_rows,
        is_language_model=True,
    ),
    "llama": Case(
        _seeded(lambda: llama(_now())), lambda n: rows(n, 1, "lm"), is_language_model=True
    ),
    "gpt2": Case(_seeded(MODELS["gpt2"]), lambda n: rows(n, 1, "lm"), is_language_model=True),
    "seq2seq": Case(_seeded(MODELS["t5"]), _target_rows, _target_collate, is_language_model=True),
    "image": Case(
        _seeded(lambda: ViTForImageClassification(vit_config())), _images, _image_collate
    ),
    "several_labels": Case(
        _seeded(lambda: bert("sequence", seed=_now(), problem_type="multi_label_classification")),
        _several_labels,
        _several_collate,
    ),
    "choices": Case(
        _seeded(lambda: BertForMultipleChoice(bert_config())), _choices, _choice_collate
    ),
}


def _now() -> int:
    """A seed that follows the one that was set."""
    return int(torch.randint(0, 1000, ()))
