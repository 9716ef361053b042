"""Toy data: rows of tokens, sentences of numbered words, and the kinds of dataset they come in."""

from collections.abc import Iterator
from typing import Any

import datasets
import torch

from tests.helpers.models import VOCABULARY

Rows = list[dict[str, Any]]


def rows(
    number: int, seed: int, labels: str | None = "row", low: int = 5, high: int = VOCABULARY
) -> datasets.Dataset:
    """Rows of random tokens of ragged length.

    Args:
        number: How many.
        seed: Seed of the tokens.
        labels: None, "row" (one of three classes), "token" (one per token, some -100) or "lm"
            (the tokens themselves).
        low: Smallest token id: another one makes another domain.
        high: One more than the largest token id.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(start: int, stop: int, size: int) -> list[int]:
        return torch.randint(start, stop, (size,), generator=generator).tolist()

    made: Rows = []
    for _ in range(number):
        length = integers(4, 11, 1)[0]
        row: dict[str, Any] = {"input_ids": integers(low, high, length)}
        row["attention_mask"] = [1] * length
        if labels == "row":
            row["labels"] = integers(0, 3, 1)[0]
        elif labels == "token":
            row["labels"] = [-100 if x == 3 else x for x in integers(0, 4, length)]
        elif labels == "lm":
            row["labels"] = list(row["input_ids"])
        made.append(row)
    return datasets.Dataset.from_list(made)


def collate(features: Rows, length: int | None = None) -> dict[str, torch.Tensor]:
    """Pad tokens with 0 and token labels with -100, to the longest row or to `length`."""
    longest = length or max(len(row["input_ids"]) for row in features)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[key], *[value] * (longest - len(row[key]))] for row in features])

    batch = {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0)}
    if "labels" in features[0]:
        ragged = isinstance(features[0]["labels"], list)
        batch["labels"] = (
            padded("labels", -100) if ragged else torch.tensor([row["labels"] for row in features])
        )
    return batch


class RowStream(torch.utils.data.IterableDataset):
    """A torch stream of rows."""

    def __init__(self, data: datasets.Dataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


class MapStyle(torch.utils.data.Dataset):
    """An author's own dataset, which is no `datasets.Dataset`."""

    def __init__(self, data: datasets.Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def words(i: int, low: int = 0, number: int = 4) -> str:
    """A sentence of the domain whose words start at `low`."""
    return " ".join(f"w{low + (5 * i + 3 * j) % 25}" for j in range(number))


def texts(low: int) -> datasets.Dataset:
    """Twelve rows of text."""
    return datasets.Dataset.from_list([{"text": words(i, low, 4 + i % 4)} for i in range(12)])


def completions(low: int) -> datasets.Dataset:
    """Twelve prompts with their completions."""
    return datasets.Dataset.from_list(
        [{"prompt": words(i, low, 3), "completion": " " + words(i + 1, low, 4)} for i in range(12)]
    )


def chats(low: int) -> datasets.Dataset:
    """Twelve questions with their answers."""
    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": words(i, low, 3)},
                    {"role": "assistant", "content": words(i + 1, low, 4)},
                ]
            }
            for i in range(12)
        ]
    )


def sentence_pairs(low: int, score: str | None = None) -> datasets.Dataset:
    """Twelve pairs of sentences; `score` names a column of similarities."""
    made = [{"anchor": words(i, low, 2 + i), "positive": words(i + 1, low, 3)} for i in range(12)]
    if score is not None:
        made = [{**row, score: (i % 5) / 4} for i, row in enumerate(made)]
    return datasets.Dataset.from_list(made)
