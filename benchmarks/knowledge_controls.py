"""Does knowledge help a classifier, and is it the knowledge? Three tasks, controls, several seeds.

terms: the organ system of a finding with a rare name, with the Human Phenotype Ontology
(examples/knowledge_injection.py is one run of it). two terms: the same beside a finding that the
patient does not have. sentiment: movie reviews, tested there and on tweets, with WordNet. The
vectors are the encoder's own encodings of definitions or glosses.

    no knowledge       the plain Trainer
    boundaries alone   every entity has the same vector: the model learns where entities are linked
    shuffled           every entity has another one's vector
    knowledge          the vectors of the entities
    definitions read   no injection: the definitions stand behind the text (of terms)
    entities alone     no text: a logistic regression on the mean vector of the linked entities

The last model of each run is tested. Settings of the first two tasks were chosen on other terms,
those of the third on other movie reviews, without knowledge.

    python benchmarks/knowledge_controls.py --bf16 true --use_cpu true
    python benchmarks/knowledge_controls.py --bf16 true --use_cpu true --task "two terms"
    python benchmarks/knowledge_controls.py --task sentiment --num_labels 100 400

Each run's numbers are kept in --output_dir: the same command goes on where it stopped, and several
may run at once. Writes results.json, table.md and knowledge.png there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from domain_data import (
    HPO_LICENCE,
    LICENCES,
    MINILM_LICENCE,
    WORDNET_LICENCE,
    cache_folder,
    load_pair,
    minilm_path,
    wordnet_path,
)
from experiment import (
    changed,
    check_methods,
    fingerprint,
    kept,
    new_classifier,
    option,
    parse,
    predict,
    run,
)
from matplotlib.figure import Figure
from rare_terms import PATTERNS, PATTERNS_OF_TWO, load_terms
from results import points, report, summarize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adapt import KnowledgeCallback
from hf_adapt.experiments.summary import percent
from hf_adapt.experiments.training import first_groups, freeze
from hf_adapt.knowledge import (
    ENGLISH_FUNCTION_WORDS,
    EntityLinker,
    EntityVectors,
    KnowledgeGraph,
    KnowledgeInjector,
)

METHODS = (
    "no knowledge",
    "boundaries alone",
    "shuffled",
    "knowledge",
    "definitions read",
    "entities alone",
)
TASK_NAMES = ("terms", "two terms", "sentiment")
MAX_LENGTH = {"definitions read": 96}  # of the others: 64


@dataclass
class BenchmarkArguments:
    task: str = option("terms", f"Terms: {HPO_LICENCE}", choices=TASK_NAMES)
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Some"})
    seeds: int = option(3, "Runs of each method, each with other labelled rows, from --seed on")
    num_labels: list[int] = field(
        default_factory=lambda: [200], metadata={"help": "Labelled rows: a table for each"}
    )

    def __post_init__(self) -> None:
        check_methods(self.methods, METHODS)


# ---------------------------------------------------------------- tasks
@dataclass(frozen=True)
class Task:
    """Rows with the columns text and label, a graph of the entities in them, and how it is used."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    tests: dict[str, Dataset]
    labels: list[str]
    linker: EntityLinker
    vectors: EntityVectors
    make_injector: Callable[[], KnowledgeInjector]
    injector_learning_rate: float
    freeze_layers: int
    settings: dict[str, Any]  # of training, unless they are given


def encoded(
    graph: KnowledgeGraph, path: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EntityVectors:
    """The definitions' encodings, made once and kept."""
    folder = cache_folder() / f"definitions-{graph.fingerprint[:12]}-{Path(path).name}"
    if not folder.is_dir():
        encoder = AutoModel.from_pretrained(path)
        vectors = EntityVectors.from_descriptions(graph, encoder, tokenizer, max_length=max_length)
        vectors.save(folder)
    return EntityVectors.load(folder)


def rare_terms(
    path: str, tokenizer: PreTrainedTokenizerBase, patterns: Sequence[str] = PATTERNS
) -> Task:
    """Findings with rare names."""
    terms = load_terms(tokenizer, patterns)
    return Task(
        path,
        tokenizer,
        terms.train,
        {"accuracy": terms.test},
        terms.labels,
        EntityLinker(terms.graph),
        encoded(terms.graph, path, tokenizer, max_length=48),
        lambda: KnowledgeInjector(2),
        injector_learning_rate=3e-3,
        freeze_layers=3,
        settings={},
    )


def two_terms(path: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Two findings, of which the patient has one."""
    settings = {"max_steps": 240, "warmup_steps": 24}
    return replace(rare_terms(path, tokenizer, PATTERNS_OF_TWO), settings=settings)


def sentiment(path: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Movie reviews and tweets, and WordNet's glosses of the synsets that they may mean."""
    pair = load_pair("movies", "tweets", 1000, 500)
    tests = {"movies": pair.source["test"], "tweets": pair.target["test"]}
    graph = KnowledgeGraph.from_wordnet(wordnet_path())

    def linker(graph: KnowledgeGraph) -> EntityLinker:
        return EntityLinker(graph, inflections="english", stop_surfaces=ENGLISH_FUNCTION_WORDS)

    rows = [pair.source["train"], *tests.values()]
    linked = linker(graph).link_batch([text for each in rows for text in each["text"]])
    meant = {c.entity for found in linked for mention in found for c in mention.candidates}
    near = [graph.neighbours(entity, limit=4).entities.tolist() for entity in sorted(meant)]
    graph = graph.subgraph(sorted(meant.union(*near)), hops=0)
    return Task(
        path,
        tokenizer,
        pair.source["train"],
        tests,
        pair.labels,
        linker(graph),
        encoded(graph, path, tokenizer, max_length=32),
        lambda: KnowledgeInjector("embeddings", "cross_attention", num_neighbours=4),
        injector_learning_rate=1e-3,
        freeze_layers=0,
        settings={"learning_rate": 1e-4},
    )


TASKS = {"terms": rare_terms, "two terms": two_terms, "sentiment": sentiment}


# ---------------------------------------------------------------- methods
def control(method: str, vectors: EntityVectors) -> EntityVectors:
    """The vectors that a method sees."""
    if method == "boundaries alone":
        return EntityVectors.from_array(np.ones((len(vectors), vectors.dimension), np.float16))
    return vectors.shuffled() if method == "shuffled" else vectors


def with_definitions(rows: Dataset, linker: EntityLinker) -> Dataset:
    """Texts with the definitions of their entities behind them."""

    def text(row: dict[str, Any]) -> dict[str, str]:
        found = [
            (m.surface, linker.graph.description(m.candidates[0].entity))
            for m in linker.link(row["text"])
        ]
        return {"text": " ".join([row["text"], *(f"{name}: {what}" for name, what in found)])}

    return rows.map(text)


def train_and_test(
    method: str, task: Task, train: Dataset, args: TrainingArguments
) -> dict[str, float]:
    """Accuracies of one run."""
    set_seed(args.seed)
    model = new_classifier(task.path, task.labels)
    freeze(model, first_groups(model, task.freeze_layers))

    def prepared(rows: Dataset) -> Dataset:
        if method == "definitions read":
            rows = with_definitions(rows, task.linker)
        length = MAX_LENGTH.get(method, 64)
        return rows.map(
            lambda batch: task.tokenizer(batch["text"], truncation=True, max_length=length),
            batched=True,
        )

    trainer = Trainer(model, args, train_dataset=prepared(train), processing_class=task.tokenizer)
    if method in ("boundaries alone", "shuffled", "knowledge"):
        knowledge = KnowledgeCallback(
            task.linker.graph,
            control(method, task.vectors),
            task.linker,
            task.make_injector(),
            learning_rate=task.injector_learning_rate,
        )
        trainer.add_callback(knowledge)
    trainer.train()
    return {
        name: accuracy_score(*predict(trainer, prepared(rows))) for name, rows in task.tests.items()
    }


def entities_alone(task: Task, train: Dataset) -> dict[str, float]:
    """What the linked entities say without the text around them."""

    def features(rows: Dataset) -> np.ndarray:
        means = []
        for mentions in task.linker.link_batch(rows["text"][:]):
            first = np.array([mention.candidates[0].entity for mention in mentions], dtype=int)
            means.append(task.vectors.gather(first).sum(0) / max(1, len(first)))
        return np.stack(means)

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    model.fit(features(train), train["label"][:])
    return {
        name: accuracy_score(rows["label"][:], model.predict(features(rows)))
        for name, rows in task.tests.items()
    }


def cell(method: str, labels: int, task: Task, args: TrainingArguments) -> dict[str, Any]:
    """One run of a method with some labelled rows, and its seconds of CPU time."""
    train = task.train.shuffle(seed=args.seed).select(range(labels))
    began = time.process_time()
    if method == "entities alone":
        scores = entities_alone(task, train)
    else:
        scores = train_and_test(method, task, train, args)
    seconds = time.process_time() - began
    return {"method": method, "labels": labels, "seed": args.seed, "seconds": seconds, **scores}


# ---------------------------------------------------------------- report
Summaries = dict[int, dict[str, dict[str, Any]]]  # by number of labels and method


def table_rows(summaries: Summaries, names: Sequence[str]) -> list[list[str]]:
    """The table's cells, header first."""
    rows = [["labels", "method", *names, "seconds"]]
    for labels, summary in summaries.items():
        for method, values in summary.items():
            cells = [percent(values[name]) for name in names]
            rows.append([str(labels), method, *cells, f"{values['seconds']['mean']:.0f}"])
    return rows


def plot(runs: list[dict[str, Any]], methods: Sequence[str], names: Sequence[str]) -> Figure:
    """A point for each run, a panel for each number of labels and test."""
    panels = [(n, name) for n in sorted({run["labels"] for run in runs}) for name in names]
    figure = Figure(figsize=(1 + 3.4 * len(panels), 2.8), layout="constrained")
    every = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (labels, name) in zip(every, panels, strict=True):
        own = [run for run in runs if run["labels"] == labels]
        points(axes, {m: [run[name] for run in own if run["method"] == m] for m in methods})
        axes.set_title(f"{labels} labels", fontsize=10)
        axes.set_xlabel(f"{name}, %")
    every[0].invert_yaxis()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    script, args, console = parse(
        BenchmarkArguments,
        __doc__,
        argv,
        output_dir="runs/knowledge",
        max_steps=120,
        warmup_steps=12,
    )
    about_sentiment = f"{LICENCES['vader4']}\n{WORDNET_LICENCE}"
    licence = about_sentiment if script.task == "sentiment" else HPO_LICENCE
    console.print(f"[dim]{licence}\n{MINILM_LICENCE}[/dim]")
    path = str(minilm_path())
    task = TASKS[script.task](path, AutoTokenizer.from_pretrained(path))
    args = changed(args, **task.settings)
    methods = [m for m in script.methods if script.task != "sentiment" or m != "definitions read"]
    data = {"train": task.train, **task.tests}
    folder = Path(args.output_dir) / script.task.replace(" ", "_")
    cells = folder / fingerprint(script, args, ("methods", "seeds", "num_labels"), data)
    runs: list[dict[str, Any]] = []
    for labels in script.num_labels:
        for seed in range(args.seed, args.seed + script.seeds):
            for method in methods:
                made = partial(cell, method, labels, task, changed(args, seed=seed))
                name = f"{method.replace(' ', '_')}-{labels}-{seed}.json"
                found = kept(cells / name, made)
                runs.append(found)
                scores = {name: f"{found[name]:.3f}" for name in task.tests}
                console.print(f"{method}, {labels} labels, seed {seed}: {scores}", highlight=False)
    summaries = {
        labels: summarize(
            [found for found in runs if found["labels"] == labels],
            METHODS,
            [*task.tests, "seconds"],
        )
        for labels in script.num_labels
    }
    legend = (
        f"Accuracy in %, mean ± sd over {script.seeds} draw(s) of the labelled rows. "
        "seconds: CPU time of training and test."
    )
    names = list(task.tests)
    figures = {"knowledge.png": plot(runs, methods, names)}
    report(table_rows(summaries, names), legend, {"runs": runs}, figures, folder, console)


if __name__ == "__main__":
    run(main)
