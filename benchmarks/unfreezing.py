"""What freezing saves: the time of a training step with the lower k of 12 layers frozen.

All runs alternate in one process. On a CPU it is one thread and its CPU time that count: wall time,
and threads that wait for one another, would measure what else a shared machine is doing.

1. `k of 12 frozen / full`, against T(k) = F + B (1 - k/12): F is a forward without gradients, B the
   rest of a full step, both measured here.
2. `stock checkpointing / ours`, k = 9: a Trainer with gradient checkpointing and the same
   parameters frozen by hand, against the callback.
3. `full / cached prefix`, k = 6 and 9: from the second epoch on.

    python benchmarks/unfreezing.py [--rounds 5] [--steps 8] [--device cuda]

About seven minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import accelerate
import datasets
import numpy as np
import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.unfreezing import FreezeOnly

LAYERS, ROWS, TOKENS, WARM_UP = 12, 16, 64, 3


def make_model() -> BertForSequenceClassification:
    """A BERT of 12 layers of width 384 (33M parameters), random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=384,
            num_hidden_layers=LAYERS,
            num_attention_heads=12,
            intermediate_size=1536,
        )
    )


def make_rows(number: int) -> datasets.Dataset:
    """Rows of 64 random tokens."""
    random = np.random.default_rng(1)
    return datasets.Dataset.from_dict(
        {
            "input_ids": random.integers(5, 30000, (number, TOKENS)).tolist(),
            "attention_mask": np.ones((number, TOKENS), dtype=int).tolist(),
            "labels": random.integers(0, 2, number).tolist(),
        }
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack equal-length rows."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def lower(k: int) -> FreezeOnly:
    """The embeddings and the lower k layers."""
    return FreezeOnly("embeddings", *(f"layer.{i}" for i in range(k)))


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(now(self.device))


def now(device: str) -> float:
    """Seconds, after all queued work; CPU time where that is what works."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def step_times(
    steps: int,
    device: str,
    callbacks: list[TrainerCallback] | None = None,
    frozen_by_hand: int = 0,
    first_epoch: bool = False,
    **settings: Any,
) -> list[float]:
    """Seconds of each step after the warm-up, or after a first epoch of `steps` steps."""
    clock = Clock(device)
    skipped = steps + WARM_UP if first_epoch else WARM_UP
    model = make_model()
    if frozen_by_hand:
        for module in (model.bert.embeddings, *model.bert.encoder.layer[:frozen_by_hand]):
            module.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=ROWS,
            max_steps=skipped + steps,
            logging_steps=1000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            learning_rate=1e-5,
            **settings,
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=make_rows(steps * ROWS if first_epoch else (skipped + steps) * ROWS),
            data_collator=collate,
            callbacks=[clock, *(callbacks or [])],
        )
        trainer.train()
    return list(np.diff(clock.ends)[skipped - 1 :])


def forward_times(steps: int, device: str) -> list[float]:
    """Seconds of a forward in training mode, without gradients."""
    model = make_model().to(device).train()
    batch = {k: v.to(device) for k, v in collate(list(make_rows(ROWS))).items()}
    ends = [now(device)]
    for _ in range(steps + WARM_UP):
        with torch.no_grad():
            float(model(**batch).loss)
        ends.append(now(device))
    return list(np.diff(ends)[WARM_UP:])


def main() -> None:
    """Run all sides in turn and print the ratios as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, device = options.steps, options.device
    transformers.logging.set_verbosity_error()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate, datasets)}
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(json.dumps({"machine": where, "threads": torch.get_num_threads(), **versions}))

    def ours(k: int, **more: Any) -> list[float]:
        cached = more.pop("cached", False)
        callback = GradualUnfreezingCallback(lower(k), cache_frozen_prefix=cached)
        return step_times(steps, device, [callback], first_epoch=cached, **more)

    checkpointing = {"gradient_checkpointing": True}
    sides: dict[str, Callable[[], list[float]]] = {
        "forward": lambda: forward_times(steps, device),
        "full": lambda: step_times(steps, device),
        **{f"k={k}": lambda k=k: ours(k) for k in (3, 6, 9, 11)},
        "stock checkpointing k=9": lambda: step_times(
            steps, device, frozen_by_hand=9, **checkpointing
        ),
        "our checkpointing k=9": lambda: ours(9, **checkpointing),
        **{f"cached k={k}": lambda k=k: ours(k, cached=True) for k in (6, 9)},
    }
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in order:
            rounds[name].append(statistics.median(sides[name]()))
        print(json.dumps({name: round(times[-1], 4) for name, times in rounds.items()}), flush=True)

    def report(comparison: str, ratios: list[float]) -> None:
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        quartiles = [round(float(low), 3), round(float(high), 3)]
        print(json.dumps({"comparison": comparison, "ratio": round(float(middle), 3),
                          "quartiles": quartiles}), flush=True)  # fmt: skip

    for k in (3, 6, 9, 11):
        each = list(zip(rounds[f"k={k}"], rounds["full"], rounds["forward"], strict=True))
        report(f"k={k} / full", [ours / full for ours, full, _ in each])
        report(
            f"k={k} / T(k)",
            [ours / (f + (full - f) * (1 - k / LAYERS)) for ours, full, f in each],
        )
    for one, other in (
        ("stock checkpointing k=9", "our checkpointing k=9"),
        ("full", "cached k=6"),
        ("full", "cached k=9"),
    ):
        pairs = zip(rounds[one], rounds[other], strict=True)
        report(f"{one} / {other}", [a / b for a, b in pairs])


if __name__ == "__main__":
    main()
