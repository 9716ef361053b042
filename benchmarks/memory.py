"""Whether memory grows while a run lasts: resident memory at two steps, for each capability.

Each run is a process of its own, with a small random BERT (8 rows of 64 tokens a step), so that
what a step left behind would show: one batch that is kept alive is about 4 MB.

    python benchmarks/memory.py [--steps 50 500] [--only mmd teacher]

About five minutes on two cores. Results: benchmarks/README.md.
"""

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, ROWS, TOKENS = (50, 500), 8, 64


def resident() -> float:
    """Resident memory of this process in MB, after freed memory was given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(name: str, steps: tuple[int, int]) -> None:
    """Train with one capability and print the resident memory at both steps."""
    import datasets
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    import hf_adapt

    torch.set_num_threads(1)

    def model(seed: int = 0) -> BertForSequenceClassification:
        torch.manual_seed(seed)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=1000,
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=128,
                attn_implementation="eager",
            )
        )

    mention = {"start": 1, "end": 3, "entities": [0], "priors": [1.0]}

    def rows(seed: int) -> datasets.Dataset:
        random = np.random.default_rng(seed)
        return datasets.Dataset.from_dict(
            {
                "input_ids": random.integers(5, 1000, (400, TOKENS)).tolist(),
                "attention_mask": np.ones((400, TOKENS), dtype=int).tolist(),
                "labels": random.integers(0, 2, 400).tolist(),
                "token_mentions": [[mention, {**mention, "start": 7, "end": 9}]] * 400,
            }
        )

    def adapted(*objectives: Any) -> Any:
        return hf_adapt.AdaptationCallback(*objectives, target_dataset=rows(2))

    def distilled(**settings: Any) -> Any:
        teacher = settings.pop("teacher", None) or model(1)
        return hf_adapt.AdaptationCallback(hf_adapt.Distillation(teacher, **settings))

    def known() -> Any:
        graph = hf_adapt.knowledge.KnowledgeGraph.from_triples([("e0", "near", "e1")])
        vectors = hf_adapt.knowledge.EntityVectors.from_array(np.ones((2, 16), dtype=np.float32))
        return hf_adapt.KnowledgeCallback(graph, vectors)

    folder = Path(tempfile.mkdtemp())
    callbacks: dict[str, Callable[[], Any]] = {
        "plain": lambda: None,
        "mmd": lambda: adapted(hf_adapt.MMD()),
        "dann": lambda: adapted(hf_adapt.DANN()),
        "information maximization": lambda: adapted(hf_adapt.InformationMaximization()),
        "teacher": distilled,
        "teacher, hidden states": lambda: distilled(
            features=[hf_adapt.distillation.HiddenStates()]
        ),
        "self-teacher": lambda: distilled(teacher=hf_adapt.distillation.SelfTeacher()),
        "cached teacher": lambda: distilled(
            teacher=hf_adapt.distillation.CachedTeacher(folder / "teacher", model(1))
        ),
        "knowledge": known,
        "unfreezing": hf_adapt.GradualUnfreezingCallback,
        "unfreezing, prefix cache": lambda: hf_adapt.GradualUnfreezingCallback(
            hf_adapt.unfreezing.FreezeOnly("embeddings", r"layer\.[01]"),
            cache_frozen_prefix=True,
            cache_dir=folder / "prefix",
        ),
    }
    if not name:
        print("\n".join(callbacks))
        return

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in steps:
                print(f"{state.global_step} {resident():.0f}", flush=True)

    words = {f"w{number}": number for number in range(1000)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), pad_token="w0"
    )
    callback = callbacks[name]()
    Trainer(
        model(),
        TrainingArguments(
            output_dir=str(folder),
            max_steps=steps[1],
            per_device_train_batch_size=ROWS,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=10_000,
        ),
        train_dataset=rows(1),
        processing_class=tokenizer,
        callbacks=[Watch(), *([] if callback is None else [callback])],
    ).train()


def run(name: str, steps: tuple[int, int]) -> list[str]:
    """What a process of its own printed."""
    command = [sys.executable, __file__, "--steps", *map(str, steps), "--one", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, help="when to look")
    parser.add_argument("--only", nargs="*", help="names of capabilities; all by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    steps = (chosen.steps[0], chosen.steps[1])
    if chosen.one is not None:
        measure(chosen.one, steps)
        return
    print(f"| capability | MB at step {steps[0]} | at step {steps[1]} | a step, kB |")
    print("|---|---|---|---|")
    for name in chosen.only or run("", steps):
        lines = [line.split() for line in run(name, steps) if line[:1].isdigit()]
        early, late = (float(value) for step, value in lines if int(step) in steps)
        growth = 1000 * (late - early) / (steps[1] - steps[0])
        print(f"| {name} | {early:.0f} | {late:.0f} | {growth:.0f} |", flush=True)


if __name__ == "__main__":
    main()
