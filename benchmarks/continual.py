"""What it costs to keep the past: steps with each method against plain steps of the same model.

Ratios of runs that alternate in one process, so that a slow machine slows both sides, on a BERT of
MiniLM-L6's shape whose every weight trains:

1. `Consolidation` (EWC with given importance), decoupled and as a gradient, against a plain step,
   of 16 and of 32 rows (what it adds does not depend on them), with an importance of 5,000 words'
   embeddings, as of some hundred rows of the past, and of all.
2. `KeepPredictions` under LoRA against a plain step under LoRA; a forward without gradients is
   measured beside it, since the aim is one further forward.
3. `Replay` at several ratios against a plain step: the aim is (1 + ratio) × 1.05.
4. A memory of 100,000 rows: seconds, and the memory of the process.

    python benchmarks/continual.py [--rounds 5] [--device cuda]

About ten minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from measure import Clock, in_turns, print_machine, print_table, ratio
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification
from workload import WITHOUT_DROPOUT, bert, random_rows, stack, step_seconds

from hf_adapt import Adaptation, AdaptationCallback
from hf_adapt.continual import Consolidation, KeepPredictions, Replay, ReplayMemory
from hf_adapt.experiments.memory import peak, restarted_peak

ROWS, TOKENS, STEPS, WARM_UP = 16, 64, 8, 3
MEMORY_ROWS, OLD_ROWS = 100_000, 200_000
WORDS, VOCABULARY = 5_000, 30_522  # that the rows of the past have, and all


def make_model(lora: bool) -> Any:
    """Of MiniLM-L6's shape, with adapters if asked."""
    model = bert(BertForSequenceClassification, 6, **WITHOUT_DROPOUT)
    if not lora:
        return model
    config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    return get_peft_model(model, config)


def step(
    make: Callable[[Any], list[Adaptation]], device: str, lora: bool = False, size: int = ROWS
) -> float:
    """Median seconds of a step of so many rows."""
    model = make_model(lora)
    rows = random_rows((STEPS + WARM_UP + 1) * size, TOKENS)
    adaptations, clock = make(model), Clock(device)
    callbacks = [AdaptationCallback(*adaptations)] if adaptations else []
    return step_seconds(model, rows, size, STEPS, WARM_UP, clock=clock, callbacks=callbacks)


def forward(device: str) -> float:
    """Median seconds of a forward of 16 rows without gradients."""
    model = make_model(lora=True).to(device).eval()
    batch = stack(list(random_rows(ROWS, TOKENS)))
    batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    clock = Clock(device)
    clock.tick()
    for _ in range(STEPS + WARM_UP):
        with torch.no_grad():
            model(**batch)
        clock.tick()
    return clock.median(WARM_UP)


def consolidation(form: Any, words: int) -> Callable[[Any], list[Adaptation]]:
    """EWC with an importance of every weight, but of the embeddings of so many words alone."""

    def make(model: Any) -> list[Adaptation]:
        generator = torch.Generator().manual_seed(0)
        importance = {
            name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()
        }
        importance["bert.embeddings.word_embeddings.weight"][words:] = 0
        return [Consolidation(importance, form=form)]

    return make


def memory() -> dict[str, Any]:
    """Seconds to choose 100,000 of 200,000 rows, and how much the process grew."""
    random = np.random.default_rng(0)
    old = datasets.Dataset.from_dict(
        {
            "input_ids": random.integers(5, 30000, (OLD_ROWS, TOKENS), dtype=np.int32),
            "labels": random.integers(0, 4, OLD_ROWS),
        }
    )
    before = restarted_peak("cpu") or 0
    begin = time.process_time()
    chosen = ReplayMemory.from_dataset(old, MEMORY_ROWS, policy="balanced")
    seconds = time.process_time() - begin
    grown = (peak("cpu") - before) / 2**20
    return {
        "memory": f"{len(chosen):,} of {OLD_ROWS:,} rows, balanced",
        "CPU seconds": f"{seconds:.1f}",
        "the process grew by, MiB": f"{grown:.0f}",
    }


def main() -> None:
    """Run the comparisons and print them as tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only_consolidation", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print_machine(options.device, "torch", "transformers", "accelerate", "peft", "datasets")
    device, lines = options.device, []
    if not options.only_consolidation:
        print_table([memory()])
    old = random_rows(1000, TOKENS, seed=3)
    for size in (ROWS, 2 * ROWS):
        sides: dict[str, Callable[[], float]] = {
            "plain": partial(step, lambda _: [], device, size=size)
        }
        for form in ("decoupled", "gradient"):
            for words in (WORDS, VOCABULARY):
                made = partial(step, consolidation(form, words), device, size=size)
                sides[f"EWC, {form}, {words:,} words / plain, {size} rows"] = made
        found = in_turns(sides, options.rounds)
        plain = found.pop("plain")
        lines += [ratio(name, seconds, plain) for name, seconds in found.items()]
    if options.only_consolidation:
        print_table(lines)
        return
    sides = {"plain": lambda: step(lambda _: [], device)}
    for share in (0.25, 1.0):
        sides[f"replay {share:g}"] = lambda share=share: step(
            lambda _: [Replay(old, ratio=share)], device
        )
    found = in_turns(sides, options.rounds)
    lines += [ratio(f"{n} / plain", s, found["plain"]) for n, s in found.items() if n != "plain"]
    with_lora: dict[str, Callable[[], float]] = {
        "plain": lambda: step(lambda _: [], device, lora=True),
        "kl": lambda: step(lambda _: [KeepPredictions()], device, lora=True),
        "forward": lambda: forward(device),
    }
    found = in_turns(with_lora, options.rounds)
    lines.append(ratio("KeepPredictions / plain, LoRA", found["kl"], found["plain"]))
    lines.append(ratio("a forward / plain, LoRA", found["forward"], found["plain"]))
    print_table(lines)
    print(f"A plain step: {1000 * statistics.median(found['plain']):.0f} ms under LoRA.")


if __name__ == "__main__":
    main()
