r"""Which layers should train when: accuracy in the domain of the labels and outside it, over seeds.

full        everything trains from the start: the plain Trainer
upper half  the upper half of the layers and the head; what lies below is computed once and cached
decayed     everything, each layer at 0.6 of the rate of the one above it
head        the head alone (a linear probe)
lp-ft       the head alone in the first half, then everything
gradual     the head first, then one layer group more per phase, from the top, at decayed rates,
            under a slanted triangular schedule (ULMFiT)

Nothing is chosen on the tests; the last model of each run is tested.

    python benchmarks/unfreezing_schedules.py --bf16 true --use_cpu true --tests movies tweets dutch
    python benchmarks/unfreezing_schedules.py --model minilm --num_train 240 --num_train_epochs 4 \
        --max_length 64 --learning_rate 3e-4 --tests movies tweets products nyt \
        --methods full head lp-ft gradual

Each run's numbers are kept in --output_dir: the same command goes on where it stopped, and several
may run at once. Writes results.json, table.md and unfreezing.png there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from domain_data import LICENCES, MINILM_LICENCE, load_pair, minilm_path
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
    tokenized,
)
from matplotlib.figure import Figure
from model_weights import E5_LICENCE, E5_PREFIX, e5_small_path
from results import points, report, summarize
from sklearn.metrics import accuracy_score
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.engine.progress import slanted_triangular
from hf_adapt.experiments.summary import percent
from hf_adapt.unfreezing import LPFT, FreezeOnly, Phase, Surgical

HEAD_RATE = {"head": 10.0}  # a new head needs a larger rate than pretrained layers


def upper_half(layers: int) -> GradualUnfreezingCallback:
    """The embeddings and the lower half of the layers frozen, and computed once."""
    frozen = ["embeddings", *(f"layer.{i}" for i in range(layers // 2))]
    return GradualUnfreezingCallback(FreezeOnly(*frozen), cache_frozen_prefix=True)


METHODS: dict[str, Callable[[int], GradualUnfreezingCallback] | None] = {
    "full": None,
    "upper half": upper_half,
    "decayed": lambda layers: GradualUnfreezingCallback([Phase(0, ".*")], layer_decay=0.6),
    "head": lambda layers: GradualUnfreezingCallback(Surgical("head"), lr_multipliers=HEAD_RATE),
    "lp-ft": lambda layers: GradualUnfreezingCallback(LPFT("50%"), lr_multipliers=HEAD_RATE),
    "gradual": lambda layers: GradualUnfreezingCallback(
        layer_decay=0.8,
        lr_multipliers=HEAD_RATE,
        rewarm_steps=5,
        lr_schedule=slanted_triangular(),
    ),
}
MODELS = {
    "minilm": (minilm_path, MINILM_LICENCE, ""),
    "e5": (e5_small_path, E5_LICENCE, E5_PREFIX),
}


@dataclass
class BenchmarkArguments:
    model: str = option("e5", "minilm has six layers, e5 twelve", choices=list(MODELS))
    source: str = option("movies", f"Domain with labels. {LICENCES['vader4']}")
    tests: list[str] = field(
        default_factory=lambda: ["movies", "tweets"],
        metadata={"help": f"Domains that are tested. Dutch: {LICENCES['multilingual']}"},
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}"}
    )
    seeds: int = option(3, "Runs of each method, each with other labelled rows, from --seed on")
    num_train: int = option(640, "Labelled training rows")
    num_test: int = option(300, "Test rows of each domain, at most")
    max_length: int = option(32, "Tokens of a text that are read")

    def __post_init__(self) -> None:
        check_methods(self.methods, METHODS)


@dataclass(frozen=True)
class Data:
    """A classifier's folder, and the tokenised rows that it is trained and tested on."""

    path: str
    tokenizer: Any
    train: Dataset
    tests: dict[str, Dataset]
    labels: list[str]


def load(script: BenchmarkArguments) -> Data:
    """All training rows of the source; some test rows of each domain."""
    find, _, prefix = MODELS[script.model]
    path = str(find())
    tokenizer = AutoTokenizer.from_pretrained(path)

    def rows(dataset: Dataset) -> Dataset:
        dataset = dataset.map(lambda row: {"text": prefix + row["text"]})
        return tokenized(dataset, tokenizer, script.max_length)

    pairs = {name: load_pair(script.source, name, None, script.num_test) for name in script.tests}
    first = next(iter(pairs.values()))
    tests = {name: rows(pair.target["test"]) for name, pair in pairs.items()}
    return Data(path, tokenizer, rows(first.source["train"]), tests, first.labels)


def cell(method: str, data: Data, num_train: int, args: TrainingArguments) -> dict[str, Any]:
    """One run of a method: its accuracies, and the seconds of CPU time of training."""
    set_seed(args.seed)
    model = new_classifier(data.path, data.labels)
    trainer = Trainer(
        model,
        args,
        train_dataset=data.train.shuffle(seed=args.seed).select(range(num_train)),
        processing_class=data.tokenizer,
    )
    make_callback = METHODS[method]
    if make_callback is not None:
        trainer.add_callback(make_callback(model.config.num_hidden_layers))
    began = time.process_time()
    trainer.train()
    found = {"method": method, "seed": args.seed, "seconds": time.process_time() - began}
    for name, rows in data.tests.items():
        found[name] = accuracy_score(*predict(trainer, rows))
    return found


def plot(runs: list[dict[str, Any]], names: Sequence[str]) -> Figure:
    """A point for each run, a panel for each test."""
    methods = [method for method in METHODS if any(run["method"] == method for run in runs)]
    figure = Figure(figsize=(1 + 2.6 * len(names), 2.6), layout="constrained")
    every = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(every, names, strict=True):
        points(axes, {m: [run[name] for run in runs if run["method"] == m] for m in methods})
        axes.set_xlabel(f"accuracy on {name}, %")
        axes.margins(0.1, 0.2)
    every[0].invert_yaxis()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    script, args, console = parse(
        BenchmarkArguments,
        __doc__,
        argv,
        output_dir="runs/unfreezing",
        num_train_epochs=2,
        learning_rate=1e-4,
    )
    console.print(f"[dim]{LICENCES['vader4']}\n{MODELS[script.model][1]}[/dim]")
    if {"french", "dutch"} & {*script.tests}:
        console.print(f"[dim]{LICENCES['multilingual']}[/dim]")
    data = load(script)
    folder = Path(args.output_dir) / f"{script.model}-{script.source}"
    rows = {"train": data.train, **data.tests}
    cells = folder / fingerprint(script, args, ("methods", "seeds"), rows)
    runs = []
    for seed in range(args.seed, args.seed + script.seeds):
        for method in script.methods:
            name = f"{method.replace(' ', '_')}-{seed}"
            own = changed(args, seed=seed, output_dir=str(cells / name))
            made = partial(cell, method, data, script.num_train, own)
            found = kept(cells / f"{name}.json", made)
            runs.append(found)
            scores = {test: f"{found[test]:.3f}" for test in data.tests}
            console.print(f"{method}, seed {seed}: {scores}", highlight=False)
    summary = summarize(runs, METHODS, [*data.tests, "seconds"])
    table = [["method", *data.tests, "seconds"]]
    for method, values in summary.items():
        cells_of = [percent(values[name]) for name in data.tests]
        table.append([method, *cells_of, f"{values['seconds']['mean']:.0f}"])
    legend = (
        f"Accuracy in %, mean ± sd over {script.seeds} draw(s) of {script.num_train} labelled rows "
        f"of {script.source}. seconds: CPU time of training."
    )
    figures = {"unfreezing.png": plot(runs, list(data.tests))}
    report(table, legend, {"runs": runs}, figures, folder, console)


if __name__ == "__main__":
    run(main)
