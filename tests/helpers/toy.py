"""A small world: words, names of them, facts about the names, sentences."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.vectors.table import EntityVectors
from tests.helpers.tokenizers import word_tokenizer

WORDS = [f"w{i}" for i in range(59)]
NAMES = {"e0": "w0", "e1": ["w1 w2", "w3"], "e2": "w1", "e3": "w4", "e4": "w4", "e5": "w5 w6 w7"}
TRIPLES = [
    ("e0", "part_of", "e1"),
    ("e1", "is_a", "e2"),
    ("e2", "is_a", "e3"),
    ("e3", "near", "e4"),
    ("e5", "near", "e0"),
]


def tokenizer(special: bool = True) -> PreTrainedTokenizerFast:
    """Words to numbers, 64 of them; with [CLS] and [SEP] or without."""
    single = "[CLS] $A [SEP]" if special else None
    return word_tokenizer(WORDS, single=single, model_max_length=32)


def graph() -> KnowledgeGraph:
    """Six entities; two share a name, two names overlap."""
    return KnowledgeGraph.from_triples(
        TRIPLES, names=NAMES, descriptions={"e0": "w8 w9", "e1": "w10"}
    )


def vectors(dimension: int = 6, seed: int = 5) -> EntityVectors:
    """One for each entity."""
    generator = np.random.default_rng(seed)
    return EntityVectors.from_array(generator.normal(size=(6, dimension)).astype(np.float32))


def sentences(number: int, seed: int, low: int = 0) -> list[str]:
    """Random words, of ragged length; nearly all name an entity."""
    generator = np.random.default_rng(seed)
    return [
        " ".join(f"w{i}" for i in low + generator.integers(0, 12, generator.integers(3, 9)))
        for _ in range(number)
    ]


def rows(number: int, seed: int, labels: str = "row", keep: Any = ("text",), low: int = 0) -> Any:
    """A tokenised dataset with its text."""
    texts = sentences(number, seed, low)
    own = tokenizer()
    generator = np.random.default_rng(seed + 1)
    made = []
    for text in texts:
        row: dict[str, Any] = dict(own(text))
        row.pop("token_type_ids", None)
        size = len(row["input_ids"])
        if labels == "row":
            row["labels"] = int(generator.integers(0, 2))
        elif labels == "token":
            row["labels"] = generator.integers(0, 2, size).tolist()
        elif labels == "lm":
            row["labels"] = list(row["input_ids"])
        elif labels == "answer":
            row["start_positions"] = int(generator.integers(1, size - 1))
            row["end_positions"] = row["start_positions"]
        made.append({**row, **({"text": text} if "text" in keep else {})})
    return datasets.Dataset.from_list(made)


def collator(labels: str = "row", side: str = "right", length: int | None = None) -> Any:
    """Pads rows, and labels of tokens."""
    own = tokenizer()
    own.padding_side = side
    if labels == "answer":  # any token may be the answer, padding too: its number must not vary
        length = 12
    how: dict[str, Any] = {"padding": True} if length is None else {"padding": "max_length"}
    if labels == "masked":
        return DataCollatorForLanguageModeling(own, mlm_probability=0.3)
    if labels in ("row", "answer"):
        return DataCollatorWithPadding(own, max_length=length, **how)
    return DataCollatorForTokenClassification(own, max_length=length, **how)


def shuffled(folder: Path) -> KnowledgeGraph:
    """The graph with its entities in another order."""
    return KnowledgeGraph.from_triples(list(reversed(TRIPLES)), names=NAMES)


def flat(model: torch.nn.Module) -> torch.Tensor:
    """All weights as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
