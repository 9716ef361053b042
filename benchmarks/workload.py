"""What the benchmarks train: a BERT with random weights, random rows, and a quiet Trainer."""

import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from measure import Clock
from transformers import (
    BertConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(
    kind: type[PreTrainedModel], layers: int, width: int = 384, seed: int = 0, **config: Any
) -> Any:
    """A BERT with random weights; 6 layers of width 384 (22.7M) are MiniLM-L6's shape."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "intermediate_size": 4 * width,
    }
    return kind(BertConfig(**shape | config))


def random_rows(number: int, tokens: int, seed: int = 1, labelled: bool = True) -> datasets.Dataset:
    """Rows of random tokens, all of one length."""
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "input_ids": random.integers(5, 30000, (number, tokens)).tolist(),
        "attention_mask": np.ones((number, tokens), dtype=int).tolist(),
    }
    if labelled:
        columns["labels"] = random.integers(0, 2, number).tolist()
    return datasets.Dataset.from_dict(columns)


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate rows of equal length."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def quiet_arguments(folder: str, device: str = "cpu", **settings: Any) -> dict[str, Any]:
    """Settings of a run that logs, saves and shows nothing."""
    return {
        "output_dir": folder,
        "use_cpu": device == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }


def step_seconds(
    model: PreTrainedModel,
    rows: datasets.Dataset,
    batch_size: int,
    steps: int,
    warm_up: int,
    *,
    clock: Clock | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    kind: type[Trainer] = Trainer,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> float:
    """Train for `warm_up` + `steps` steps; return the median seconds of a step after the warm-up.

    Args:
        model: The model to train.
        rows: Training rows.
        batch_size: Rows of a step.
        steps: Steps that count.
        warm_up: Steps before them.
        clock: How time is measured.
        callbacks: Callbacks of the run.
        kind: The Trainer's class.
        settings: Further TrainingArguments.
        options: Further arguments of the Trainer.
    """
    clock = clock or Clock()
    with tempfile.TemporaryDirectory() as folder:
        chosen = quiet_arguments(
            folder,
            clock.device,
            per_device_train_batch_size=batch_size,
            max_steps=warm_up + steps,
            **settings or {},
        )
        trainer = kind(
            model,
            TrainingArguments(**chosen),
            train_dataset=rows,
            callbacks=[clock, *callbacks],
            **{"data_collator": stack, **options},
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.median(warm_up)
