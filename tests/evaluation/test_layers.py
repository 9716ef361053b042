"""Distances of the domains in every layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    Trainer,
    ViTForImageClassification,
    default_data_collator,
)

from hf_adapt.alignment.mmd import mmd_loss
from hf_adapt.evaluation import LayerDistance, layer_distances, proxy_a_distance
from tests.helpers.data import MapStyle, RowStream, collate, rows
from tests.helpers.models import MODELS, family, vit_config
from tests.helpers.sounds import sound_collate, sounds, wav2vec2
from tests.helpers.trainers import arguments

SOURCE, TARGET = rows(40, 1, "row", high=30), rows(44, 2, None, low=25)


def trainer_of(model: Any, folder: Path, collator: Any = collate, **settings: Any) -> Trainer:
    return Trainer(model, arguments(folder, **settings), data_collator=collator)


def hidden_states(model: Any, data: datasets.Dataset) -> list[np.ndarray]:
    """The pooled hidden states of a model, by its own output_hidden_states, a row at a time."""
    found = []
    for row in data:
        batch = {k: torch.tensor([row[k]]) for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states = model.eval()(**batch, output_hidden_states=True).hidden_states
        found.append([state[0].mean(0).numpy() for state in states])
    return [np.stack(layer) for layer in zip(*found, strict=True)]


@pytest.mark.parametrize("name", ["bert", "lora", "bert_tokens"])
def test_distances_are_those_of_the_hidden_states(name: str, tmp_path: Path) -> None:
    model = family(name)
    found = layer_distances(trainer_of(model, tmp_path), SOURCE, TARGET)
    assert [each.name for each in found] == ["embeddings", "layer.0", "layer.1"]
    expected = zip(hidden_states(model, SOURCE), hidden_states(model, TARGET), strict=True)
    for each, (source, target) in zip(found, expected, strict=True):
        both = torch.tensor(source), torch.tensor(target)
        assert each.mmd == pytest.approx(float(mmd_loss(*both, unbiased=True)), rel=1e-4)
        # Its folds follow the order of the rows.
        assert each.a_distance == pytest.approx(proxy_a_distance(source, target), abs=0.3)
        assert each.a_distance > 1 and each.mmd > 0.01


@pytest.mark.parametrize("name", ["gpt2", "llama_rows", "lora_llama", "modernbert", "bert_masked"])
def test_other_families(name: str, tmp_path: Path) -> None:
    found = layer_distances(trainer_of(family(name), tmp_path), SOURCE, TARGET)
    assert [each.name for each in found] == ["embeddings", "layer.0", "layer.1"]
    assert all(each.mmd > 0 and each.a_distance > 0.5 for each in found)


def image_rows(number: int, shift: float) -> datasets.Dataset:
    noise = np.random.default_rng(int(10 * shift)).normal(size=(number, 3, 8, 8)) + shift
    return datasets.Dataset.from_dict({"pixel_values": noise.astype(np.float32)})


@pytest.mark.parametrize(
    ("model", "make", "collator"),
    [
        (lambda: ViTForImageClassification(vit_config()), image_rows, default_data_collator),
        (wav2vec2, sounds, sound_collate),
    ],
)
def test_images_and_sounds(
    model: Callable[[], Any], make: Callable[..., Any], collator: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    trainer = trainer_of(model(), tmp_path, collator)
    near = layer_distances(trainer, make(20, 0.1), make(20, 0.2))
    far = layer_distances(trainer, make(20, 0.1), make(20, 5.0))
    assert [each.name for each in far] == ["embeddings", "layer.0", "layer.1"]
    assert all(b.mmd > a.mmd for a, b in zip(near, far, strict=True))


def test_equal_domains_are_near_and_labels_and_batches_change_nothing(tmp_path: Path) -> None:
    model = family("bert")
    poisoned = SOURCE.map(lambda row: {"labels": 2 - row["labels"]})
    found: list[list[LayerDistance]] = []
    for data, size in ((SOURCE, 8), (poisoned, 3)):
        trainer = trainer_of(model, tmp_path, per_device_eval_batch_size=size)
        found.append(layer_distances(trainer, data, TARGET))
    for one, other in zip(*found, strict=True):
        assert one.mmd == pytest.approx(other.mmd, abs=1e-5) and one.a_distance == other.a_distance
    alike = layer_distances(trainer, rows(300, 3, None), rows(300, 4, None))
    assert all(abs(each.mmd) < 0.01 and abs(each.a_distance) < 0.4 for each in alike)


@pytest.mark.parametrize(
    "kind", [lambda d: d, MapStyle, RowStream, lambda d: d.to_iterable_dataset(), list]
)
def test_kinds_of_data_and_a_limit(kind: Callable[[Any], Any], tmp_path: Path) -> None:
    trainer, seen = trainer_of(family("bert"), tmp_path), []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = layer_distances(trainer, kind(SOURCE), kind(TARGET), max_items=12)
    assert len(found) == 3
    assert sum(seen) == 24
    assert not trainer.model.bert.encoder.layer[0]._forward_hooks


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 10 rows in the target_dataset, got 5"):
        layer_distances(trainer_of(family("bert"), tmp_path), SOURCE, TARGET.select(range(5)))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration does not take such rows"):
        layer_distances(trainer_of(MODELS["t5"](), tmp_path), SOURCE, TARGET)
    flat = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="No stack of layers in Linear"):
        layer_distances(trainer_of(flat, tmp_path), SOURCE, TARGET)
