"""Whether memory grows while a run lasts: resident memory at two steps, for each capability.

Each run is a process of its own, with a small random BERT (8 rows of 64 tokens a step), so that
what a step left behind would show: one batch that is kept alive is about 4 MB.

    python benchmarks/memory.py [--steps 50 500] [--only mmd teacher]

About five minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measure import in_fresh_process, print_machine, print_table, progress
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from workload import bert, quiet_arguments

import hf_adapt
from hf_adapt.distillation import CachedTeacher, HiddenStates, SelfTeacher
from hf_adapt.experiments.memory import resident
from hf_adapt.knowledge import EntityVectors, KnowledgeGraph
from hf_adapt.unfreezing import FreezeOnly

STEPS, ROWS, TOKENS, WORDS = (50, 500), 8, 64, 1000


def megabytes() -> float:
    """What this process holds in memory, after freed memory was given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident() / 1e6


def model(seed: int = 0) -> BertForSequenceClassification:
    shape = {"vocab_size": WORDS, "num_attention_heads": 4, "intermediate_size": 128}
    kind = BertForSequenceClassification
    return bert(kind, 4, 64, seed, attn_implementation="eager", **shape)


def rows(seed: int) -> datasets.Dataset:
    """Rows of random tokens with two mentions of an entity each."""
    random = np.random.default_rng(seed)
    mention = {"start": 1, "end": 3, "entities": [0], "priors": [1.0]}
    return datasets.Dataset.from_dict(
        {
            "input_ids": random.integers(5, WORDS, (400, TOKENS)).tolist(),
            "attention_mask": np.ones((400, TOKENS), dtype=int).tolist(),
            "labels": random.integers(0, 2, 400).tolist(),
            "token_mentions": [[mention, {**mention, "start": 7, "end": 9}]] * 400,
        }
    )


def adapted(*objectives: Any) -> TrainerCallback:
    return hf_adapt.AdaptationCallback(*objectives, target_dataset=rows(2))


def distilled(teacher: Any = None, **settings: Any) -> TrainerCallback:
    return hf_adapt.AdaptationCallback(hf_adapt.Distillation(teacher or model(1), **settings))


def known() -> TrainerCallback:
    graph = KnowledgeGraph.from_triples([("e0", "near", "e1")])
    vectors = EntityVectors.from_array(np.ones((2, 16), dtype=np.float32))
    return hf_adapt.KnowledgeCallback(graph, vectors)


def frozen(folder: Path) -> TrainerCallback:
    """The prefix of a frozen encoder, cached."""
    return hf_adapt.GradualUnfreezingCallback(
        FreezeOnly("embeddings", r"layer\.[01]"),
        cache_frozen_prefix=True,
        cache_dir=folder / "prefix",
    )


CAPABILITIES: dict[str, Callable[[Path], TrainerCallback | None]] = {
    "plain": lambda _: None,
    "mmd": lambda _: adapted(hf_adapt.MMD()),
    "dann": lambda _: adapted(hf_adapt.DANN()),
    "information maximization": lambda _: adapted(hf_adapt.InformationMaximization()),
    "teacher": lambda _: distilled(),
    "teacher, hidden states": lambda _: distilled(features=[HiddenStates()]),
    "self-teacher": lambda _: distilled(SelfTeacher()),
    "cached teacher": lambda folder: distilled(CachedTeacher(folder / "teacher", model(1))),
    "knowledge": lambda _: known(),
    "unfreezing": lambda _: hf_adapt.GradualUnfreezingCallback(),
    "unfreezing, prefix cache": frozen,
}


class Watch(TrainerCallback):
    """Megabytes at some steps."""

    def __init__(self, steps: tuple[int, int]) -> None:
        self.megabytes = dict.fromkeys(steps, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.megabytes:
            self.megabytes[state.global_step] = megabytes()


def measure(name: str, steps: tuple[int, int]) -> list[float]:
    """Train with one capability; return the megabytes at both steps."""
    torch.set_num_threads(1)
    words = {f"w{number}": number for number in range(WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), pad_token="w0"
    )
    watch = Watch(steps)
    with tempfile.TemporaryDirectory() as folder:
        callback = CAPABILITIES[name](Path(folder))
        settings = quiet_arguments(folder, max_steps=steps[1], per_device_train_batch_size=ROWS)
        Trainer(
            model(),
            TrainingArguments(**settings),
            train_dataset=rows(1),
            processing_class=tokenizer,
            callbacks=[watch, *([callback] if callback else [])],
        ).train()
    return list(watch.megabytes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, help="when to look")
    parser.add_argument(
        "--only", nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES), help="all by default"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    first, last = chosen.steps
    if chosen.one:
        print(json.dumps(measure(chosen.one, (first, last))))
        return
    print_machine("cpu", "torch", "transformers", "accelerate", "datasets")
    lines = []
    for name in chosen.only:
        early, late = in_fresh_process(__file__, "--steps", first, last, "--one", name)
        line = {
            "capability": name,
            f"MB at step {first}": round(early),
            f"at step {last}": round(late),
            "a step, kB": round(1000 * (late - early) / (last - first)),
        }
        progress(line)
        lines.append(line)
    print_table(lines)


if __name__ == "__main__":
    main()
