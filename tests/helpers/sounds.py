"""A tiny model of sounds, and sounds for it."""

from typing import Any

import datasets
import numpy as np
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from tests.helpers.models import SIZE


def sounds(number: int, shift: float) -> datasets.Dataset:
    """Noise of ragged length around a level."""
    generator = np.random.default_rng(int(10 * shift))
    made = [generator.normal(shift, 1, 150 + 10 * (i % 4)).tolist() for i in range(number)]
    return datasets.Dataset.from_dict({"input_values": made})


def sound_collate(features: Any) -> dict[str, torch.Tensor]:
    """Pad waves with silence, and say where they are."""
    waves = [torch.tensor(f["input_values"]) for f in features]
    masks = [torch.ones(len(wave), dtype=torch.long) for wave in waves]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_values": pad(waves, True), "attention_mask": pad(masks, True)}
    if "labels" in features[0]:
        batch["labels"] = torch.tensor([f["labels"] for f in features])
    return batch


def wav2vec2_config(**settings: Any) -> Wav2Vec2Config:
    """Two convolutions: a frame for 20 samples."""
    return Wav2Vec2Config(
        conv_dim=[8, 8],
        conv_kernel=[10, 3],
        conv_stride=[5, 4],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
        **settings,
    )


def wav2vec2() -> Any:
    """Two layers over such frames."""
    return Wav2Vec2ForSequenceClassification(wav2vec2_config(**SIZE))
