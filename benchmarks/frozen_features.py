"""The 12 pairs of vader4 as vectors of a model that is not trained."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from domain_data import load_pair, minilm_path
from transformers import AutoModel, AutoTokenizer

SETTINGS = yaml.safe_load((Path(__file__).parent / "configs" / "vader4.yaml").read_text())


@dataclass(frozen=True)
class FrozenPair:
    """Rows of a pair of domains as vectors, without the dimensions that are constant over them."""

    name: str
    source: Any
    labels: Any
    dev: Any
    dev_labels: Any
    target: Any
    target_labels: Any
    test: Any
    truth: Any


class Features:
    """Mean-pooled unit vectors of texts, each computed once."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(minilm_path())
        self.model = AutoModel.from_pretrained(minilm_path()).eval()
        self.known: dict[str, Any] = {}

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Any:
        new = sorted({text for text in texts if text not in self.known}, key=len)
        options = {"truncation": True, "max_length": SETTINGS["max_length"], "padding": True}
        for at in range(0, len(new), 32):
            part = new[at : at + 32]
            batch = self.tokenizer(part, return_tensors="pt", **options)
            mask = batch["attention_mask"].unsqueeze(-1)
            summed = (self.model(**batch).last_hidden_state * mask).sum(1)
            self.known.update(
                zip(part, torch.nn.functional.normalize(summed.double()), strict=True)
            )
        return torch.stack([self.known[text] for text in texts]).numpy()


def frozen_pairs(chosen: Sequence[str] | None = None) -> Iterator[FrozenPair]:
    """The pairs, SOURCE:TARGET, or those that are named."""
    features = Features()
    every = [f"{a}:{b}" for a, b in itertools.permutations(SETTINGS["data"], 2)]
    for pair in chosen or every:
        data = load_pair(*pair.split(":"), SETTINGS["num_train"], SETTINGS["num_test"])
        splits = (data.source["train"], data.source["dev"], data.target_unlabelled)
        parts = [*splits, data.target["test"]]
        vectors = [features(list(part["text"])) for part in parts]
        varied = np.concatenate([vectors[0], vectors[2]]).std(0) > 1e-6
        source, dev, target, test = (each[:, varied] for each in vectors)
        own, dev_labels, truth, labels = (
            np.array(part["label"])
            for part in (data.target["train"], splits[1], parts[3], splits[0])
        )
        yield FrozenPair(
            pair.replace(":", " → "), source, labels, dev, dev_labels, target, own, test, truth
        )
