"""Does what WordNet knows of the words help a sentiment classifier, in its domain and outside it?

MiniLM trains on labelled movie reviews, and is tested on movie reviews and on tweets. WordNet's
synsets are linked in every text and enter the model by cross-attention; their vectors are MiniLM's
own encodings of the glosses. Three controls show what a gain comes from:

    no knowledge      the plain Trainer
    boundaries alone  every synset has the same vector: the model learns where words are linked
    shuffled          every synset has another one's vector
    WordNet           the vectors of the synsets
    words of WordNet  no text: a logistic regression on the mean vector of the linked synsets

Nothing is chosen by any test's labels; the last model of each run is tested.

Measured with 100 and 400 labels and three draws of them (accuracy in %, movies / tweets):

                        100 labels      400 labels
    no knowledge        72.3 / 60.3     80.8 / 67.2
    boundaries alone    67.3 / 57.7     80.1 / 65.9
    shuffled            66.8 / 60.4     80.1 / 69.0
    WordNet             66.1 / 55.3     79.7 / 67.7
    words of WordNet    57.5 / 55.1     65.6 / 63.2

with deviations of 1 to 8 on movies and 3 to 10 on tweets: no help here, and with 100 labels
whatever is added costs 5 points. Half an hour on two cores; the first run encodes 28,572 glosses in
two minutes more, which are kept. Steps and rate were settled on other movie reviews, without
knowledge.

    python examples/knowledge_injection.py
    python examples/knowledge_injection.py --seeds 5 --num_labels 50 200
    python examples/knowledge_injection.py --source nyt --target products --form gated

Writes results.json, table.md, explanations.txt and knowledge.png to --output_dir. Every option of
TrainingArguments can be given as well.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adapt import KnowledgeCallback
from hf_adapt.knowledge import (
    ENGLISH_FUNCTION_WORDS,
    EntityLinker,
    EntityVectors,
    KnowledgeGraph,
    KnowledgeInjector,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import (
    LICENCES,
    MINILM_LICENCE,
    WORDNET_LICENCE,
    cache_folder,
    load_pair,
    minilm_path,
    wordnet_path,
)
from experiment import (
    DOMAINS,
    TESTS,
    changed,
    check_methods,
    new_classifier,
    option,
    parse,
    predict,
    run,
)
from results import grouped_bars, report, summarize

from hf_adapt.experiments.summary import percent
from hf_adapt.storage.text_file import write_text

METHODS = {
    "plain": "no knowledge",
    "boundaries": "boundaries alone",
    "shuffled": "shuffled",
    "wordnet": "WordNet",
    "lexicon": "words of WordNet",
}
EXPLAINED = (
    "The plot is a bank that nobody would trust with money.",
    "A charming picture, though the second act drags.",
    "She gave a dreadful performance in New York.",
)

TRAINING_DEFAULTS = {
    "output_dir": "runs/knowledge_injection",
    "max_steps": 120,
    "learning_rate": 1e-4,
    "warmup_steps": 12,
}


@dataclass
class ExampleArguments:
    source: str = option("movies", f"Domain with labels. {LICENCES['vader4']}", choices=DOMAINS)
    target: str = option("tweets", "Domain that is only tested", choices=DOMAINS)
    model_name_or_path: str | None = option(None, f"Default: {MINILM_LICENCE}")
    wordnet: str | None = option(None, f"A WordNet's dict folder. Default: {WORDNET_LICENCE}")
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}"}
    )
    seeds: int = option(3, "Runs of each method, each with other labelled rows, from --seed on")
    num_labels: list[int] = field(
        default_factory=lambda: [100, 400], metadata={"help": "Labelled rows: a table for each"}
    )
    num_pool: int = option(1000, "Rows that the labelled ones are drawn from")
    num_test: int = option(500, "Test rows of each domain, at most")
    max_length: int = option(64, "Tokens of a text that are read")
    form: str = option("cross_attention", "How: gated, cross_attention or adapter")
    layer: str = option("embeddings", "Where: embeddings, or the number of a layer")
    num_neighbours: int = option(4, "Neighbours in WordNet that are attended to beside a synset")
    injector_learning_rate: float = option(1e-3, "Of the injector; the model has --learning_rate")

    def __post_init__(self) -> None:
        check_methods(self.methods, METHODS)


# ---------------------------------------------------------------- knowledge
@dataclass
class Knowledge:
    graph: KnowledgeGraph
    linker: EntityLinker
    vectors: EntityVectors


def load_knowledge(script: ExampleArguments, console: Console) -> Knowledge:
    """What WordNet has of the words in the texts, a linker, and the glosses' encodings.

    To encode all glosses would take ten minutes: those of the synsets that the texts may
    mean, and of their neighbours, are encoded once and kept. No label is looked at.
    """
    graph = KnowledgeGraph.from_wordnet(script.wordnet)
    linker = EntityLinker(graph, inflections="english", stop_surfaces=ENGLISH_FUNCTION_WORDS)
    pair = load_pair(script.source, script.target, script.num_pool, script.num_test)
    texts = [
        *pair.source["train"]["text"],
        *pair.source["test"]["text"],
        *pair.target["test"]["text"],
    ]
    linked = [mention for found in linker.link_batch([*texts, *EXPLAINED]) for mention in found]
    meant = {candidate.entity for mention in linked for candidate in mention.candidates}
    near = [graph.neighbours(e, limit=script.num_neighbours).entities for e in sorted(meant)]
    graph = graph.subgraph(sorted(meant.union(*(ids.tolist() for ids in near))), hops=0)
    linker = EntityLinker(graph, inflections="english", stop_surfaces=ENGLISH_FUNCTION_WORDS)
    model = Path(script.model_name_or_path).name
    folder = cache_folder() / f"glosses-{graph.fingerprint[:12]}-{model}"
    if not folder.is_dir():
        console.print(f"Encoding {graph.num_entities:,} glosses (once, some minutes)")
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        encoder = AutoModel.from_pretrained(script.model_name_or_path)
        EntityVectors.from_descriptions(graph, encoder, tokenizer, max_length=32).save(folder)
    return Knowledge(graph, linker, EntityVectors.load(folder))


def control(method: str, vectors: EntityVectors) -> EntityVectors:
    """The vectors that a method sees."""
    if method == "boundaries":
        return EntityVectors.from_array(np.ones((len(vectors), vectors.dimension), np.float16))
    return vectors.shuffled() if method == "shuffled" else vectors


# ---------------------------------------------------------------- data
@dataclass
class Data:
    train: Dataset
    tests: dict[str, Dataset]
    labels: list[str]


def load(script: ExampleArguments, number: int, seed: int) -> Data:
    """A few rows of the source with labels, and both domains' tests."""
    pair = load_pair(script.source, script.target, script.num_pool, script.num_test)
    train = pair.source["train"].shuffle(seed=seed).select(range(number))
    tests = {"in domain": pair.source["test"], "out of domain": pair.target["test"]}
    return Data(train, tests, pair.labels)


def tokenized(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The tokens beside the text, which the callback links."""
    return dataset.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)


# ---------------------------------------------------------------- training
def train_and_test(
    method: str, script: ExampleArguments, args: TrainingArguments, data: Data, known: Knowledge
) -> tuple[dict[str, Any], KnowledgeCallback | None]:
    set_seed(args.seed)
    path = script.model_name_or_path
    model = new_classifier(path, data.labels)
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=script.max_length)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokenized(data.train, tokenizer),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    callback = None
    if method != "plain":
        place = int(script.layer) if script.layer.lstrip("-").isdigit() else script.layer
        callback = KnowledgeCallback(
            known.graph,
            control(method, known.vectors),
            known.linker,
            KnowledgeInjector(place, script.form, num_neighbours=script.num_neighbours),
            learning_rate=script.injector_learning_rate,
        )
        trainer.add_callback(callback)
    start = time.perf_counter()
    trainer.train()
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    for name, dataset in data.tests.items():
        truth, guess = predict(trainer, tokenized(dataset, tokenizer))
        found[name] = accuracy_score(truth, guess)
    return found, callback


def lexicon(data: Data, known: Knowledge) -> dict[str, Any]:
    """What the linked synsets say without the text around them."""
    start = time.perf_counter()

    def features(dataset: Dataset) -> np.ndarray:
        rows = []
        for mentions in known.linker.link_batch(dataset["text"][:]):
            first = np.array([mention.candidates[0].entity for mention in mentions], dtype=int)
            rows.append(known.vectors.gather(first).sum(0) / max(1, len(first)))
        return np.stack(rows)

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    model.fit(features(data.train), data.train["label"][:])
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    for name, dataset in data.tests.items():
        found[name] = accuracy_score(dataset["label"][:], model.predict(features(dataset)))
    return found


# ---------------------------------------------------------------- report
def table_rows(summaries: dict[int, dict[str, dict[str, Any]]]) -> list[list[str]]:
    """The table's cells, header first."""
    rows = [["labels", "method", *TESTS, "seconds"]]
    for labels, summary in summaries.items():
        for method, values in summary.items():
            cells = [percent(values[name]) for name in TESTS]
            rows.append([str(labels), METHODS[method], *cells, f"{values['seconds']['mean']:.0f}"])
    return rows


def plot(summaries: dict[int, dict[str, dict[str, Any]]]) -> Figure:
    """Bars of each method, a panel for each number of labels."""
    figure = Figure(figsize=(4.6 * len(summaries), 3.8), layout="constrained")
    panels = figure.subplots(1, len(summaries), sharey=True, squeeze=False)[0]
    for axes, (labels, summary) in zip(panels, summaries.items(), strict=True):
        ticks = [METHODS[method].replace(" ", "\n", 1) for method in summary]
        series = {test: [values[test] for values in summary.values()] for test in TESTS}
        grouped_bars(axes, ticks, series, fontsize=8)
        axes.set_title(f"{labels} labels", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    scores = [v[test] for summary in summaries.values() for v in summary.values() for test in TESTS]
    lowest = min(100 * (score["mean"] - (score["sd"] or 0)) for score in scores)
    panels[0].set_ylim(max(0, lowest - 5), None)
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(loc="upper left", frameon=False, fontsize=8, ncols=2)
    return figure


def show(callback: KnowledgeCallback, console: Console, output_dir: Path) -> None:
    """What the trained injector makes of a few sentences."""
    found = [callback.explain(text) for text in EXPLAINED]
    for explanation in found:
        console.print(str(explanation), highlight=False, markup=False)
    write_text(output_dir / "explanations.txt", "\n".join(map(str, found)) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **TRAINING_DEFAULTS)
    for licence in (LICENCES["vader4"], MINILM_LICENCE, WORDNET_LICENCE):
        console.print(f"[dim]{licence}[/dim]")
    script.model_name_or_path = script.model_name_or_path or str(minilm_path())
    script.wordnet = script.wordnet or str(wordnet_path())
    known = load_knowledge(script, console)
    console.print(f"{known.graph}")

    runs: list[dict[str, Any]] = []
    shown = None
    for labels in script.num_labels:
        for seed in range(args.seed, args.seed + script.seeds):
            data = load(script, labels, seed)
            run_args = changed(args, seed=seed)
            for method in script.methods:
                console.print(f"[bold]{METHODS[method]}[/bold], {labels} labels, seed {seed}")
                if method == "lexicon":
                    found = lexicon(data, known)
                else:
                    found, callback = train_and_test(method, script, run_args, data, known)
                    shown = callback if method == "wordnet" else shown
                runs.append({"method": method, "labels": labels, "seed": seed, **found})
                scores = {name: f"{found[name]:.3f}" for name in TESTS}
                console.print(f"  {scores}", highlight=False)
    if args.process_index != 0:
        return

    output_dir = Path(args.output_dir)
    summaries = {
        labels: summarize([r for r in runs if r["labels"] == labels], METHODS, [*TESTS, "seconds"])
        for labels in script.num_labels
    }
    legend = (
        f"Accuracy in %, mean ± sd over {script.seeds} draw(s) of the labelled rows of "
        f"{script.source}; out of domain: {script.target}. seconds: of training."
    )
    figures = {"knowledge.png": plot(summaries)}
    report(table_rows(summaries), legend, {"runs": runs}, figures, output_dir, console)
    if shown is not None:
        show(shown, console, output_dir)
        console.print(f"wrote {output_dir / 'explanations.txt'}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
