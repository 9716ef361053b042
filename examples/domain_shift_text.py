"""Does a text classifier work in another domain, and how much do unlabelled texts from there help?

Fine-tunes one model several times, tests it in the domain it was trained on (source) and in another
one (target), and prints a table of the methods:

    source   fine-tuned on the source's labels alone, as anyone would
    dann     the same, and one line that adds domain-adversarial training on unlabelled target texts
    mmd+im   the same, and one line that adds two other terms on the same unlabelled target texts
    oracle   fine-tuned on the target's labels: the upper bound

Labels of the target are used by the oracle, and for testing; never for training or choosing any
other model. Every model is the last of its run.

    python examples/domain_shift_text.py
    python examples/domain_shift_text.py --benchmark spam2 --source sms --target email --seeds 5
    python examples/domain_shift_text.py --source mine.csv --target theirs.csv --num_train 5000

Takes about seven minutes on two CPU cores. What is finished is kept in --output_dir: the same
command again goes on where it stopped. Every option of TrainingArguments can be given as well.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adapt import MMD, AdaptationCallback, DomainAdversarialCallback, InformationMaximization

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import BENCHMARKS, LICENCES, MINILM_LICENCE, Pair, load_pair, minilm_path
from experiment import (
    changed,
    check_methods,
    fingerprint,
    new_classifier,
    option,
    parse,
    predict,
    run,
    tokenized,
)
from results import BLUE, GREY, ORANGE, percent, report, write
from results import summarize as means

METHODS = {
    "source": "source only",
    "dann": "DANN",
    "mmd+im": "MMD + IM",
    "oracle": "oracle",
}
SCORES = ("source_accuracy", "source_f1", "target_accuracy", "target_f1")

DEFAULT_PAIRS = {"vader4": ("movies", "tweets"), "spam2": ("sms", "email")}
TRAINING_DEFAULTS = {
    "output_dir": "runs/domain_shift_text/BENCHMARK-SOURCE-TARGET",
    "num_train_epochs": 2,
    "disable_tqdm": False,
}


@dataclass
class DemoArguments:
    benchmark: str = option("vader4", " ".join(LICENCES.values()), choices=list(BENCHMARKS))
    source: str | None = option(
        None, "Domain with labels: one of the benchmark, a csv/json/jsonl/parquet file, or a hub id"
    )
    target: str | None = option(None, "Domain to adapt to, given in the same way")
    text_column: str = option("text", "Column with the text, in data of your own")
    label_column: str = option("label", "Column with the label, in data of your own")
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {MINILM_LICENCE}")
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}"}
    )
    seeds: int = option(3, "Runs of each method, with seeds from --seed on")
    num_train: int = option(480, "Training rows of each domain, at most")
    num_test: int = option(500, "Test rows of each domain, at most")
    balanced: bool = option(False, "Keep as many rows of every label, in both domains")
    max_length: int = option(64, "Tokens of a text that are read")
    freeze_layers: int = option(3, "Train neither embeddings nor the first N layers (0: train all)")
    save_models: bool = option(False, "Save every model, as a Hugging Face folder")
    overwrite: bool = option(False, "Train again what is already finished")

    def __post_init__(self) -> None:
        self.source = self.source or DEFAULT_PAIRS[self.benchmark][0]
        self.target = self.target or DEFAULT_PAIRS[self.benchmark][1]
        check_methods(self.methods, METHODS)


def freeze_first_layers(model: PreTrainedModel, count: int) -> None:
    """Turn off the gradients of the embeddings and of the first layers, for speed."""
    layers = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    if count >= len(layers):
        raise ValueError(f"--freeze_layers {count}, but the model has {len(layers)} layers")
    first_trained = next(layers[count].parameters())
    for parameter in model.base_model.parameters() if count else ():
        if parameter is first_trained:
            break
        parameter.requires_grad_(False)


def train_and_test(
    method: str, seed: int, pair: Pair, script: DemoArguments, args: TrainingArguments
) -> dict:
    """Fine-tune once; return accuracy and macro-F1 in both domains, and the seconds of training."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = new_classifier(script.model_name_or_path, pair.labels)
    freeze_first_layers(model, script.freeze_layers)

    def rows(dataset: Dataset) -> Dataset:
        return tokenized(dataset, tokenizer, script.max_length)

    train_domain = pair.target if method == "oracle" else pair.source
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows(train_domain["train"]),
        eval_dataset=rows(train_domain["dev"]),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    target = rows(pair.target_unlabelled)  # has no label column
    if method == "dann":
        trainer.add_callback(DomainAdversarialCallback(target_dataset=target))
    elif method == "mmd+im":
        trainer.add_callback(
            AdaptationCallback(MMD(), InformationMaximization(), target_dataset=target)
        )

    start = time.perf_counter()
    trainer.train()
    result = {"method": method, "seed": seed, "seconds": time.perf_counter() - start}
    for name, domain in (("source", pair.source), ("target", pair.target)):
        truth, guess = predict(trainer, rows(domain["test"]))
        result[f"{name}_accuracy"] = accuracy_score(truth, guess)
        result[f"{name}_f1"] = f1_score(truth, guess, average="macro")
    if script.save_models:
        trainer.save_model()
    return result


def summarize(results: list[dict]) -> dict[str, dict]:
    """Means over seeds, and the share of the gap to the oracle that each method closes."""
    summary = means(results, METHODS, (*SCORES, "seconds"))
    if {"source", "oracle"} <= summary.keys():
        floor, ceiling = (summary[m]["target_accuracy"]["mean"] for m in ("source", "oracle"))
        for method in summary.keys() - {"source", "oracle"}:
            gained = summary[method]["target_accuracy"]["mean"] - floor
            summary[method]["gap_closed"] = gained / (ceiling - floor) if ceiling > floor else None
    return summary


def table_rows(summary: dict[str, dict]) -> list[list[str]]:
    """The table's cells, header first."""
    scores = ("source acc.", "source F1", "target acc.", "target F1")
    rows = [["method", *scores, "gap closed", "seconds"]]
    for method, values in summary.items():
        gap = values.get("gap_closed")
        share = "–" if gap is None else f"{gap:.0%}"
        cells = [percent(values[key]) for key in SCORES]
        rows.append([METHODS[method], *cells, share, f"{values['seconds']['mean']:.0f}"])
    return rows


def plot(results: list[dict], title: str, majority: float) -> Figure:
    """Bars of the accuracy on the target, with a point for each seed."""
    summary = summarize(results)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    means = [100 * values["target_accuracy"]["mean"] for values in summary.values()]
    colours = {"source": GREY, "oracle": "#52606d"}
    bars = axes.bar(
        [METHODS[method] for method in summary],
        means,
        width=0.62,
        color=[colours.get(method, BLUE) for method in summary],
    )
    places = {method: place for place, method in enumerate(summary)}
    points = [100 * result["target_accuracy"] for result in results]
    across = [places[result["method"]] + 0.2 for result in results]  # beside the bar's number
    axes.scatter(across, points, s=22, color="white", edgecolor="black", zorder=3, label="a seed")
    axes.bar_label(bars, fmt="%.1f", label_type="center", color="white", fontweight="bold")
    for method in colours.keys() & summary.keys():
        level = 100 * summary[method]["target_accuracy"]["mean"]
        axes.axhline(level, ls="--", lw=1, color=colours[method], zorder=0)
    axes.axhline(100 * majority, ls=":", lw=1.5, color=ORANGE, label="most frequent label")
    levels = [*points, 100 * majority]
    axes.set_ylim(max(0, min(levels) - 6), min(102, max(levels) + 4))
    axes.set_ylabel("accuracy on the target, %")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(DemoArguments, __doc__, argv, **TRAINING_DEFAULTS)
    if {script.source, script.target} & BENCHMARKS[script.benchmark].keys():
        console.print(f"[dim]{script.benchmark}: {LICENCES[script.benchmark]}[/dim]")
    pair = load_pair(
        script.benchmark,
        script.source,
        script.target,
        num_train=script.num_train,
        num_test=script.num_test,
        balanced=script.balanced,
        text_column=script.text_column,
        label_column=script.label_column,
    )
    no_effect = ("seeds", "methods", "overwrite", "save_models")
    settings = fingerprint(script, args, no_effect, pair.source, pair.target)
    if script.model_name_or_path is None:
        console.print(f"[dim]{MINILM_LICENCE}[/dim]")
        script.model_name_or_path = str(minilm_path())
    output_dir = Path(args.output_dir)
    if args.output_dir == TRAINING_DEFAULTS["output_dir"]:
        names = [Path(part).stem for part in (script.source, script.target)]
        output_dir = output_dir.with_name("-".join([script.benchmark, *names]))

    truth = pair.target["test"]["label"][:]
    about = {
        "benchmark": script.benchmark,
        "source": script.source,
        "target": script.target,
        "training_rows_source": pair.source["train"].num_rows,
        "training_rows_target": pair.target_unlabelled.num_rows,
        "test_rows_source": pair.source["test"].num_rows,
        "test_rows_target": len(truth),
        "majority_share_of_target": max(map(truth.count, set(truth))) / len(truth),
    }
    console.print(
        f"[bold]{script.source} → {script.target}[/bold]: {about['training_rows_source']} training "
        f"rows with labels, {about['training_rows_target']} of the target without; "
        f"{about['test_rows_source']} and {len(truth)} to test on. Always answering the most "
        f"frequent label of the target is right in {about['majority_share_of_target']:.1%}."
    )

    results = []
    for seed in range(args.seed, args.seed + script.seeds):
        for method in script.methods:
            run_dir = output_dir / f"{method}-seed{seed}-{settings}"
            finished = run_dir / "result.json"
            complete = finished.exists()
            if script.save_models:
                complete = complete and (run_dir / "config.json").exists()
            if complete and not script.overwrite:
                console.print(f"{METHODS[method]}, seed {seed}: kept from an earlier run")
                results.append(json.loads(finished.read_text()))
                continue
            console.print(f"[bold]{METHODS[method]}[/bold], seed {seed}")
            run_args = changed(args, seed=seed, output_dir=str(run_dir))
            results.append(train_and_test(method, seed, pair, script, run_args))
            if args.process_index == 0:
                write(finished, json.dumps(results[-1], indent=2))
    if args.process_index != 0:
        return

    summary = summarize(results)
    title = f"{script.source} → {script.target}"
    legend = (
        f"In %, mean ± sd over {script.seeds} seed(s). IM: information maximization. oracle: "
        "trained on the target's labels. gap closed: share of the way, in target accuracy, from "
        "source only to oracle. seconds: of training."
    )
    report(
        table_rows(summary),
        legend,
        about | {"summary": summary, "runs": results},
        {"target_accuracy.png": plot(results, title, about["majority_share_of_target"])},
        output_dir,
        console,
        title,
    )
    if script.save_models:
        console.print(f"models in {output_dir}/METHOD-seedN-*", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    run(main)
