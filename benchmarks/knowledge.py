"""What knowledge costs: a training step with injection, a large graph in memory, WordNet's loading.

1. `step`: a step of the `Trainer` with a `KnowledgeCallback` (gated addition at one layer, four
   mentions a row; linking, alignment and gathering included) against a step without, in turns, by
   the CPU time of one thread.
2. `memory`: what a graph of a million entities and five million triples takes, built and loaded in
   fresh processes.
3. `wordnet`: seconds to load WordNet and to link the 23,703 sentences of vader4 (fetched).

    python benchmarks/knowledge.py [step] [memory] [wordnet] [--rounds 9] [--steps 4]

Five minutes on two cores. Results: benchmarks/README.md. Linking against other libraries:
benchmarks/knowledge_linking.py.
"""

import argparse
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_adapt import KnowledgeCallback
from hf_adapt.knowledge import EntityLinker, EntityVectors, KnowledgeGraph, KnowledgeInjector

ROWS, TOKENS, MENTIONS, WORDS, WARM_UP = 16, 64, 4, 30000, 2
ENTITIES, TRIPLES, NAMES = 1_000_000, 5_000_000, 1000
PACKAGES = ["torch", "transformers", "accelerate", "numpy", "pyarrow"]


# ---------------------------------------------------------------- a step
def words() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each word."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=TOKENS
    )


def rows(number: int) -> datasets.Dataset:
    """Texts of 64 words, of which four are names of entities."""
    random = np.random.default_rng(0)
    texts = random.integers(NAMES, WORDS, (number, TOKENS))
    for text in texts:
        text[random.choice(TOKENS, MENTIONS, replace=False)] = random.integers(0, NAMES, MENTIONS)
    texts = [" ".join(f"w{i}" for i in text) for text in texts]
    made = datasets.Dataset.from_dict(
        {"text": texts, "labels": random.integers(0, 2, number).tolist()}
    )
    tokenizer = words()
    return made.map(lambda batch: tokenizer(batch["text"]), batched=True)


class StepTimes(TrainerCallback):
    """CPU seconds of each optimizer step, collating included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.process_time())


def step_seconds(data: datasets.Dataset, steps: int, knowledge: Any) -> float:
    """The median CPU time of a step."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS + 2,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
        )
    )
    clock, tokenizer = StepTimes(), words()
    callbacks: list[TrainerCallback] = [clock]
    if knowledge is not None:
        graph, vectors, linker = knowledge
        injector = KnowledgeInjector(3)
        callbacks.append(KnowledgeCallback(graph, vectors, linker, injector))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model,
            TrainingArguments(
                folder,
                per_device_train_batch_size=ROWS,
                max_steps=steps + WARM_UP + 1,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=data,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=callbacks,
        ).train()
    return statistics.median(np.diff(clock.ends)[WARM_UP:])


def step(rounds: int, steps: int) -> dict[str, Any]:
    """The ratio of a step with knowledge to one without."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    data = rows((steps + WARM_UP + 2) * ROWS)
    random = np.random.default_rng(1)
    triples = [(f"e{i}", "r", f"e{random.integers(0, NAMES)}") for i in range(NAMES)]
    graph = KnowledgeGraph.from_triples(triples, names={f"e{i}": f"w{i}" for i in range(NAMES)})
    table = random.normal(size=(graph.num_entities, 128)).astype(np.float32)
    knowledge = (graph, EntityVectors.from_array(table, graph), EntityLinker(graph))
    ratios = []
    for number in range(rounds):
        order = [None, knowledge] if number % 2 else [knowledge, None]
        seconds = {one is not None: step_seconds(data, steps, one) for one in order}
        ratios.append(seconds[True] / seconds[False])
        print(f"  round {number + 1}: {ratios[-1]:.3f}", flush=True)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


# ---------------------------------------------------------------- memory
def resident() -> float:
    """Megabytes that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def build_large(folder: str) -> dict[str, Any]:
    """Build a graph of a million entities from a table of triples, and save it."""
    import pandas

    random = np.random.default_rng(0)
    head = random.integers(0, ENTITIES, TRIPLES)
    head[:ENTITIES] = np.arange(ENTITIES)
    tail = random.integers(0, ENTITIES, TRIPLES)
    keys = pandas.Series([f"Q{i}" for i in range(ENTITIES)])
    relations = pandas.Series([f"P{i}" for i in range(100)])
    table = pandas.DataFrame(
        {
            "head": pandas.Categorical.from_codes(head, keys),
            "relation": pandas.Categorical.from_codes(random.integers(0, 100, TRIPLES), relations),
            "tail": pandas.Categorical.from_codes(tail, keys),
        }
    )
    del head, tail
    before, start = resident(), time.perf_counter()
    graph = KnowledgeGraph.from_triples(table)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    del table
    held = resident()
    graph.save(folder)
    return {
        "seconds": round(seconds, 1),
        "entities": graph.num_entities,
        "triples": graph.num_triples,
        "MB_at_the_peak_above_before": round(peak - before),
        "MB_of_process_holding_it": round(held),
    }


def load_large(folder: str) -> dict[str, Any]:
    """Load it and ask for the neighbours of many entities."""
    before, start = resident(), time.perf_counter()
    graph = KnowledgeGraph.load(folder)
    seconds = time.perf_counter() - start
    random = np.random.default_rng(1)
    start = time.perf_counter()
    asked = 20_000
    for entity in random.integers(0, graph.num_entities, asked).tolist():
        graph.neighbours(entity, limit=4)
    each = (time.perf_counter() - start) / asked
    return {
        "seconds": round(seconds, 2),
        "MB_above_before": round(resident() - before),
        "microseconds_for_neighbours": round(1e6 * each, 1),
    }


def in_fresh_process(part: str, folder: str) -> dict[str, Any]:
    """Run a part by itself."""
    command = [sys.executable, __file__, part, "--folder", folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory() -> dict[str, Any]:
    """Both parts."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch, "graph"))
        built = in_fresh_process("build", folder)
        return {"built": built, "loaded": in_fresh_process("load", folder)}


# ---------------------------------------------------------------- WordNet
def wordnet() -> dict[str, Any]:
    """Seconds to load WordNet, to make a linker and to link vader4."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import domain_data

    folder = domain_data.wordnet_path()
    found: dict[str, Any] = {}
    start = time.process_time()
    graph = KnowledgeGraph.from_wordnet(folder)
    found["load"] = round(time.process_time() - start, 1)
    start = time.process_time()
    linker = EntityLinker(graph)
    found["linker"] = round(time.process_time() - start, 1)
    data = domain_data.fetch(domain_data.VADER)
    texts = [
        line.split("\t", 2)[2]
        for stem in domain_data.VADER_STEMS.values()
        for line in (data / f"{stem}.tsv").read_text(encoding="latin-1").splitlines()
        if line.strip()
    ]
    start = time.process_time()
    mentions = linker.link_batch(texts)
    seconds = time.process_time() - start
    characters = sum(map(len, texts))
    found |= {
        "sentences": len(texts),
        "mentions": sum(map(len, mentions)),
        "link": round(seconds, 2),
        "million_characters_per_second": round(characters / 1e6 / seconds, 1),
    }
    return found


def main() -> None:
    """Run the parts that were named, or all, and print them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("step", "memory", "wordnet")
    # argparse would hold an empty list against choices.
    parser.add_argument("parts", nargs="*", help=f"Any of {', '.join(parts)}; all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        one = build_large if options.parts == ["build"] else load_large
        print(json.dumps(one(options.folder)))
        return
    if unknown := set(options.parts) - set(parts):
        parser.error(f"unknown parts {sorted(unknown)}: choose from {', '.join(parts)}")
    found: dict[str, Any] = {}
    for part in options.parts or parts:
        print(part, flush=True)
        if part == "step":
            found[part] = step(options.rounds, options.steps)
        else:
            found[part] = memory() if part == "memory" else wordnet()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(json.dumps({"machine": platform.machine(), "versions": versions, **found}, indent=1))


if __name__ == "__main__":
    main()
