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
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import domain_data
import numpy as np
import torch
from measure import in_fresh_process, in_turns, print_machine, print_table, ratio
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)
from workload import bert, step_seconds

from hf_adapt import KnowledgeCallback
from hf_adapt.experiments.memory import resident
from hf_adapt.knowledge import EntityLinker, EntityVectors, KnowledgeGraph, KnowledgeInjector

ROWS, TOKENS, MENTIONS, WORDS, WARM_UP = 16, 64, 4, 30000, 2
ENTITIES, TRIPLES, NAMES = 1_000_000, 5_000_000, 1000


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


def step(rounds: int, steps: int) -> list[dict[str, Any]]:
    """The ratio of a step with knowledge to one without."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    data = rows((steps + WARM_UP + 2) * ROWS)
    random = np.random.default_rng(1)
    triples = [(f"e{i}", "r", f"e{random.integers(0, NAMES)}") for i in range(NAMES)]
    graph = KnowledgeGraph.from_triples(triples, names={f"e{i}": f"w{i}" for i in range(NAMES)})
    table = random.normal(size=(graph.num_entities, 128)).astype(np.float32)
    vectors, linker = EntityVectors.from_array(table, graph), EntityLinker(graph)

    def train(knowledge: bool) -> float:
        injector = KnowledgeInjector(3)
        tokenizer = words()
        return step_seconds(
            bert(BertForSequenceClassification, 6, vocab_size=WORDS + 2),
            data,
            ROWS,
            steps,
            WARM_UP,
            callbacks=[KnowledgeCallback(graph, vectors, linker, injector)] if knowledge else [],
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )

    seconds = in_turns({"with": lambda: train(True), "without": lambda: train(False)}, rounds)
    return [ratio("step with `KnowledgeCallback` / plain step", *seconds.values())]


# ---------------------------------------------------------------- memory
def megabytes() -> float:
    """What this process holds in memory."""
    return resident() / 2**20


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
    before, start = megabytes(), time.perf_counter()
    graph = KnowledgeGraph.from_triples(table)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    del table
    held = megabytes()
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
    before, start = megabytes(), time.perf_counter()
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
        "MB_above_before": round(megabytes() - before),
        "microseconds_for_neighbours": round(1e6 * each, 1),
    }


def memory() -> list[dict[str, Any]]:
    """Both parts, each in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch, "graph"))
        parts = ("build", "load")
        return [{"": p} | in_fresh_process(__file__, p, "--folder", folder) for p in parts]


# ---------------------------------------------------------------- WordNet
def wordnet() -> list[dict[str, Any]]:
    """Seconds to load WordNet, to make a linker and to link vader4."""
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
    return [found]


def main() -> None:
    """Run the parts that were named, or all, and print a table for each."""
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
    print_machine("cpu", "torch", "transformers", "accelerate", "numpy", "pyarrow")
    for part in options.parts or parts:
        if part == "step":
            print_table(step(options.rounds, options.steps))
        else:
            print_table(memory() if part == "memory" else wordnet())


if __name__ == "__main__":
    main()
