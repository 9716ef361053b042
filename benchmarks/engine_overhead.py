"""What the engine costs: a training step through it, against the same arithmetic by hand.

Two ratios, each of runs that alternate in one process, so that a slow machine slows both sides:

1. `callback / hand-written`: a step of `Trainer` + `DomainAdversarialCallback` against a loop that
   does the same arithmetic (joint forward, task loss, reversed domain loss, clipping, both AdamW
   optimizers, learning-rate schedule) over the same loader. The plain Trainer's own overhead over
   a plain loop is measured beside it, because it is inside the first ratio.
2. `weight 0 / stock`: a run whose objective is off against the plain Trainer.

    python benchmarks/engine_overhead.py [--pairs 8] [--steps 10] [--device cuda]

About five minutes on two cores. Results: benchmarks/README.md.
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
import torch.nn.functional as F
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from hf_adapt import DANN, dann_ramp
from hf_adapt.alignment import DomainAdversarialCallback, DomainDiscriminator
from hf_adapt.engine.collating import DOMAIN, AdaptationCollator
from hf_adapt.engine.pairing import PairedDataset

ROWS, TOKENS, WARM_UP = 16, 64, 3


def make_model() -> BertForSequenceClassification:
    """A BERT of MiniLM-L6's shape (22.7M parameters), without dropout, random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def make_rows(number: int, seed: int, labelled: bool) -> datasets.Dataset:
    """Rows of 64 random tokens."""
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "input_ids": random.integers(5, 30000, (number, TOKENS)).tolist(),
        "attention_mask": np.ones((number, TOKENS), dtype=int).tolist(),
    }
    if labelled:
        columns["labels"] = random.integers(0, 2, number).tolist()
    return datasets.Dataset.from_dict(columns)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack equal-length rows."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(now(self.device))


def now(device: str) -> float:
    """Seconds, after all queued work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step_times(ends: list[float]) -> list[float]:
    """Seconds of each step after the warm-up."""
    return list(np.diff(ends)[WARM_UP:])


def with_trainer(steps: int, device: str, callbacks: list[TrainerCallback]) -> list[float]:
    """Steps of a Trainer."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=ROWS,
            max_steps=steps + WARM_UP + 1,
            logging_steps=1000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            learning_rate=1e-5,
        )
        source = make_rows((steps + WARM_UP + 2) * ROWS, 1, labelled=True)
        trainer = Trainer(
            make_model(),
            args,
            train_dataset=source,
            data_collator=collate,
            callbacks=[clock, *callbacks],
        )
        trainer.train()
    return step_times(clock.ends)


def adversarial() -> list[TrainerCallback]:
    """The callback under test."""
    return [DomainAdversarialCallback(target_dataset=make_rows(400, 2, labelled=False))]


def switched_off() -> list[TrainerCallback]:
    """The callback with a constant weight of 0."""
    return [DomainAdversarialCallback(target_dataset=make_rows(400, 2, labelled=False), weight=0)]


class Reverse(torch.autograd.Function):
    """Gradient reversal, by hand."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        """The identity."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The reversed gradient."""
        return -ctx.scale * gradient, None


def by_hand(steps: int, device: str, aligned: bool) -> list[float]:
    """The same arithmetic in a loop, over the same loader; source rows alone unless aligned."""
    model = make_model().to(device)
    model.train()
    source = make_rows((steps + WARM_UP + 2) * ROWS, 1, labelled=True)
    rows: Any = source
    collator: Any = collate
    if aligned:
        rows = PairedDataset(source, [make_rows(400, 2, labelled=False)], 1.0, 42)
        collator = AdaptationCollator(collate, ["labels"])
    loader = torch.utils.data.DataLoader(rows, ROWS, shuffle=True, collate_fn=collator)
    total = steps + WARM_UP + 1
    discriminator = DomainDiscriminator(384, 2).to(device)
    optimizers = [
        torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.0, fused=True),
        torch.optim.AdamW(discriminator.parameters(), 1e-3, weight_decay=0.0),
    ]
    schedules = [get_linear_schedule_with_warmup(o, 0, total) for o in optimizers]
    ramp, ends = dann_ramp(), []
    for step, loaded in enumerate(loader):
        if step == total:
            break
        batch = {key: value.to(device) for key, value in loaded.items()}
        domain = batch.pop(DOMAIN, None)
        labels = batch.pop("labels")
        hidden = model.bert(**batch)
        logits = model.classifier(model.dropout(hidden.pooler_output))
        loss = F.cross_entropy(logits, labels)
        if aligned:
            mask = batch["attention_mask"].unsqueeze(-1).float()
            features = (hidden.last_hidden_state * mask).sum(1) / mask.sum(1)
            scores = discriminator(Reverse.apply(features, ramp(step / total)))
            loss = loss + F.cross_entropy(scores, domain)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if aligned:
            torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
        float(loss.detach())  # the Trainer reads its loss at every step, to filter NaN
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ends.append(now(device))
    return step_times(ends)


def compare(
    name: str, one: Callable[[], list[float]], other: Callable[[], list[float]], pairs: int
) -> dict[str, Any]:
    """Alternate the two, swapping who goes first, and compare their median steps."""
    ratios, times = [], ([], [])
    for pair in range(pairs):
        order = [(0, one), (1, other)] if pair % 2 == 0 else [(1, other), (0, one)]
        medians: dict[int, float] = {}
        for side, run in order:
            medians[side] = statistics.median(run())
            times[side].append(medians[side])
        ratios.append(medians[0] / medians[1])
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    result = {
        "comparison": name,
        "ratio": round(float(middle), 4),
        "quartiles": [round(float(low), 4), round(float(high), 4)],
        "seconds_per_step": [round(statistics.median(side), 4) for side in times],
        "pairs": pairs,
    }
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    """Run the comparisons and print them as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    steps, device = options.steps, options.device
    transformers.logging.set_verbosity_error()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate, datasets)}
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(json.dumps({"machine": where, "threads": torch.get_num_threads(), **versions}))
    assert DANN().hidden_sizes == (256,), "the hand-written discriminator is the default one"
    compare(
        "plain Trainer / plain loop",
        lambda: with_trainer(steps, device, []),
        lambda: by_hand(steps, device, aligned=False),
        options.pairs,
    )
    compare(
        "callback / hand-written loop",
        lambda: with_trainer(steps, device, adversarial()),
        lambda: by_hand(steps, device, aligned=True),
        options.pairs,
    )
    compare(
        "weight 0 / stock Trainer",
        lambda: with_trainer(steps, device, switched_off()),
        lambda: with_trainer(steps, device, []),
        options.pairs,
    )


if __name__ == "__main__":
    main()
