"""What a language model forgets of other texts when it learns one kind, and what keeps it.

Trains LoRA adapters of SmolLM2-135M-Instruct on SMS, at a rate and for as long as it takes to
forget: once as any script would (plain), and once with each method. Perplexities are measured on
SMS, on newspaper text, of which the methods with replay see a few rows, and on movie reviews, of
which no method sees any.

    python benchmarks/forgetting_language_model.py --bf16 true --use_cpu true
    python benchmarks/forgetting_language_model.py --methods plain replay --seeds 1

One to four minutes of CPU time a run. Each run's numbers are kept in --output_dir: the same command
goes on where it stopped. Writes results.json, table.md and forgetting.png there.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from domain_data import LICENCES
from experiment import changed, check_methods, fingerprint, kept, option, parse, run
from forgetting import plot
from language_models import TEXTS, load_model, lora_trainer, perplexities, rows_of
from model_weights import SMOLLM2_LICENCE, smollm2_path
from results import report, summarize
from transformers import AutoTokenizer, Trainer, TrainingArguments

from hf_adapt import Adaptation, adapt
from hf_adapt.continual import (
    AveragedWeights,
    Consolidation,
    Fisher,
    KeepPredictions,
    Replay,
    ReplayMemory,
    interpolate,
)
from hf_adapt.experiments.summary import Score

TRAINING_DEFAULTS = {
    "output_dir": "runs/forgetting_language_model",
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
}


@dataclass(frozen=True)
class Start:
    """A model, and what it may learn next."""

    path: str
    rank: int
    ratio: float
    args: TrainingArguments
    train: Dataset
    memory: ReplayMemory

    def trainer(self) -> Trainer:
        """A Trainer of new adapters."""
        return lora_trainer(self.path, self.rank, self.args, self.train)

    def learn(self, *adaptations: Adaptation) -> Trainer:
        """Train with some methods; return the Trainer."""
        trainer = self.trainer()
        adapt(trainer, *adaptations).train()
        return trainer

    def replay(self) -> Replay:
        """Rows of the memory beside the new ones."""
        return Replay(self.memory, self.ratio)

    def between(self, alpha: float) -> Trainer:
        """Train without any method, and go part of the way back to the start."""
        trainer = self.learn()
        model: Any = trainer.model
        trainer.model = interpolate(load_model(self.path), model.merge_and_unload(), alpha)
        return trainer


METHODS: dict[str, Callable[[Start], Trainer]] = {
    "plain": lambda start: start.learn(),
    "replay": lambda start: start.learn(start.replay()),
    "KL to start": lambda start: start.learn(KeepPredictions()),
    "replay + KL": lambda start: start.learn(start.replay(), KeepPredictions(on="replay")),
    "interpolation": lambda start: start.between(0.5),
    "EWC": lambda start: start.learn(Consolidation(Fisher(start.memory))),
    "L2-SP": lambda start: start.learn(Consolidation()),
    "EMA": lambda start: start.learn(AveragedWeights("ema")),
}


def with_weight(weight: float, on: str) -> Callable[[Start], Trainer]:
    """KL to start with another weight."""
    return lambda start: start.learn(
        *[start.replay()] * (on == "replay"), KeepPredictions(weight, on=on)
    )


WEIGHTS = {
    f"{name}, weight {weight:g}": with_weight(weight, on)
    for name, on in (("KL to start", "new"), ("replay + KL", "replay"))
    for weight in (0.1, 0.3, 3.0)
}
"""By which a weight was chosen; to be named in --methods."""


@dataclass
class BenchmarkArguments:
    train: str = option("sms", f"Texts to learn. {LICENCES['spam2']}", choices=TEXTS)
    general: str = option("nyt", f"Texts of the memory. {LICENCES['vader4']}", choices=TEXTS)
    other: str = option("movies", "Texts that are tested only", choices=TEXTS)
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {SMOLLM2_LICENCE}")
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}"}
    )
    seeds: int = option(3, "Runs of each method, with seeds from --seed on")
    rank: int = option(16, "Rank of the adapters")
    block_size: int = option(48, "Tokens of a row")
    num_test: int = option(64, "Test rows of each domain")
    memory_size: int = option(64, "Rows of the general texts that are kept")
    ratio: float = option(0.5, "Rows of the memory beside each new row")

    def __post_init__(self) -> None:
        check_methods(self.methods, METHODS | WEIGHTS)


def cell(
    method: str, start: Start, tests: dict[str, Dataset], before: dict[str, float]
) -> dict[str, Any]:
    """One run of a method: perplexities, what they say in nats, and seconds of CPU time."""
    began = time.process_time()
    trainer = (METHODS | WEIGHTS)[method](start)
    seconds = time.process_time() - began
    after = perplexities(trainer, tests)
    learnt, general, other = (math.log(after[name] / before[name]) for name in tests)
    return {
        "method": method,
        "seed": start.args.seed,
        "seconds": seconds,
        **after,
        "learnt": -learnt,
        "forgotten": general,
        "forgotten, other": other,
    }


def shown(score: Score) -> str:
    """A mean of perplexities with its standard deviation."""
    return f"{score['mean']:.0f}" + ("" if score["sd"] is None else f" ± {score['sd']:.0f}")


def table_rows(
    names: Sequence[str], before: dict[str, float], summary: dict[str, dict[str, Any]]
) -> list[list[str]]:
    """The table's cells, header first; what a method removes of plain's forgetting, and costs."""
    rows = [["method", *names, "learnt", "removed", "removed, other", "seconds"]]
    rows.append(["start", *(f"{before[name]:.0f}" for name in names), "–", "–", "–", "–"])
    plain = summary.get("plain")
    for method, values in summary.items():
        shares = ["–"] * 3
        if plain is not None and method != "plain":
            parts = [values[key]["mean"] / plain[key]["mean"] for key in SHARES]
            shares = [f"{100 * part:.0f} %" for part in (parts[0], 1 - parts[1], 1 - parts[2])]
        perplexity = [shown(values[name]) for name in names]
        rows.append([method, *perplexity, *shares, f"{values['seconds']['mean']:.0f}"])
    return rows


SHARES = ("learnt", "forgotten", "forgotten, other")


def main(argv: Sequence[str] | None = None) -> None:
    script, args, console = parse(BenchmarkArguments, __doc__, argv, **TRAINING_DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}\n{LICENCES['spam2']}\n{SMOLLM2_LICENCE}[/dim]")
    path = script.model_name_or_path or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    names = [script.train, script.general, script.other]
    tests = {n: rows_of(n, "test", tokenizer, script.block_size, script.num_test) for n in names}
    train, general = (rows_of(n, "train", tokenizer, script.block_size) for n in names[:2])
    memory = ReplayMemory.from_dataset(general, size=script.memory_size)
    folder = Path(args.output_dir) / "-".join(names)
    data = {"train": train, "memory": memory.dataset, **tests}
    cells = folder / fingerprint(script, args, ("methods", "seeds"), data)
    first = Start(path, script.rank, script.ratio, args, train, memory)
    before = kept(cells / "start.json", lambda: perplexities(first.trainer(), tests))
    results = []
    for seed in range(args.seed, args.seed + script.seeds):
        start = replace(first, args=changed(args, seed=seed))
        for method in script.methods:
            made = partial(cell, method, start, tests, before)
            found = kept(cells / f"{method.replace(' ', '_')}-{seed}.json", made)
            results.append(found)
            numbers = ", ".join(f"{n} {before[n]:.1f} → {found[n]:.1f}" for n in names)
            console.print(f"{method}, seed {seed}: {numbers}", highlight=False)
    summary = summarize(results, METHODS | WEIGHTS, [*names, *SHARES, "seconds"])
    title = f"{script.train} beside {script.general}"
    legend = (
        f"Perplexity per token, mean ± sd over {script.seeds} seed(s); {args.max_steps} steps. "
        f"learnt, removed: shares of what plain learns, and forgets of {script.general} and "
        f"{script.other}, in nats. seconds: CPU time."
    )
    axes = {
        "forgotten, other": f"forgetting: nats per token that {script.other} has lost",
        "learnt": f"nats per token that {script.train} has gained",
    }
    figures = {"forgetting.png": plot(results, summary, title, axes, scale=1)}
    document = {"start": before, "runs": results}
    report(table_rows(names, before, summary), legend, document, figures, folder, console, title)


if __name__ == "__main__":
    run(main)
