"""Half the layers of a language model are gone: how much does the whole model teach the rest?

SmolLM2-135M-Instruct has 30 layers; the student starts as every second of them and trains on
movie reviews in short rows, once with cross-entropy alone and once with the teacher's predictions
beside (`DistillationTrainer`, which forms both losses from pieces of the logits). The run also
measures what a step of each kind adds to the memory at its peak, with whole logits and in pieces.

Measured with the defaults (40 steps; perplexity of movies / newspaper): teacher 206 / 151, student
untrained 824,000 / 725,000, cross-entropy 845 / 1,750, distilled 672 / 1,217. So the same steps
bring more with the teacher, in 85 seconds for 60, and 40 are far too few to reach it. A step of
512 tokens adds 990 MiB of memory with whole logits and 297 MiB in pieces. Four minutes on two
cores.

    python examples/distil_causal_lm.py
    python examples/distil_causal_lm.py --max_steps 300 --student_layers 20
    python examples/distil_causal_lm.py --model_name_or_path FOLDER_OR_HUB_ID

Needs the package gguf for the default weights. Writes results.json, table.md and perplexity.png to
--output_dir. Every option of TrainingArguments can be given as well.
"""

import gc
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import student_from_teacher

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import LICENCES
from experiment import DOMAINS, changed, option, parse, run
from language_models import load_model, texts_of
from model_weights import SMOLLM2_LICENCE, smollm2_path
from results import grouped_bars, report

from hf_adapt.experiments.memory import peak, restarted_peak
from hf_adapt.experiments.plots import ORANGE
from hf_adapt.experiments.summary import score

MODELS = {
    "teacher": "teacher",
    "before": "student, not trained",
    "cross_entropy": "student, cross-entropy",
    "distilled": "student, distilled",
}

TRAINING_DEFAULTS = {
    "output_dir": "runs/distil_causal_lm",
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "warmup_steps": 5,
    "logging_steps": 10,
}


@dataclass
class ExampleArguments:
    train: str = option("movies", f"Domain to train on. {LICENCES['vader4']}", choices=DOMAINS)
    other: str = option("nyt", "Domain that is tested only", choices=DOMAINS)
    model_name_or_path: str | None = option(None, f"Of the teacher. Default: {SMOLLM2_LICENCE}")
    student_layers: int = option(15, "Layers of the teacher that the student keeps")
    block_size: int = option(64, "Tokens of a row")
    num_test: int = option(32, "Test rows of each domain")
    temperature: float = option(1.0, "Both models' logits are divided by it")
    kd_weight: float = option(0.5, "Factor of the distillation term; of cross-entropy: 1 - it")
    memory_rows: int = option(8, "Rows of the step whose memory is measured; 0: do not")


def blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int) -> Dataset:
    """All texts one after the other, with an end sign between them, cut into rows."""
    ids = [
        token
        for text in texts
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"],
                      tokenizer.eos_token_id]
    ]  # fmt: skip
    rows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def make_trainer(
    model: PreTrainedModel,
    args: TrainingArguments,
    train: Dataset | None = None,
    **distillation: Any,
) -> Trainer:
    """A Trainer, or with a teacher a DistillationTrainer; all rows are of one length."""
    kind = DistillationTrainer if distillation else Trainer
    trainer = kind(
        model=model,
        args=args,
        train_dataset=train,
        data_collator=default_data_collator,
        **distillation,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---------------------------------------------------------------- memory of a step
class StepMemory(TrainerCallback):
    """How much more memory the last step held at its peak than at its start, in bytes."""

    device = "cuda" if torch.cuda.is_available() else "cpu"
    added: int | None = None  # unknown where there is no /proc

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        self.start = restarted_peak(self.device)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.added = None if self.start is None else peak(self.device) - self.start


def step_memory(
    script: ExampleArguments,
    args: TrainingArguments,
    teacher: PreTrainedModel,
    train: Dataset,
    chunked: bool | None,
) -> int | None:
    """Of the second step: the first one also makes the optimizer's moments."""
    args = changed(args, max_steps=2, per_device_train_batch_size=script.memory_rows)
    trainer = make_trainer(
        student_from_teacher(teacher, script.student_layers),
        args,
        train,
        teacher=teacher,
        temperature=script.temperature,
        chunked=chunked,
    )
    trainer.add_callback(memory := StepMemory())
    trainer.train()
    return memory.added


# ---------------------------------------------------------------- report
def plot(results: dict[str, dict], memory: dict[str, int | None]) -> Figure:
    """Bars of the perplexities, and of the memory of a step."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    first, second = figure.subplots(1, 2, width_ratios=[2.2, 1])
    domains = [name for name in next(iter(results.values())) if name in DOMAINS]
    series = {domain: [score([found[domain]]) for found in results.values()] for domain in domains}
    ticks = [MODELS[name].replace(", ", ",\n") for name in results]
    for bars in grouped_bars(first, ticks, series, scale=1, fontsize=8):
        first.bar_label(bars, fmt="%.3g", fontsize=8)
    first.set_yscale("log")
    first.set_ylabel("perplexity")
    first.legend(frameon=False, fontsize=8)
    known = {name: value / 2**20 for name, value in memory.items() if value is not None}
    bars = second.bar(list(known), list(known.values()), color=ORANGE, width=0.5)
    second.bar_label(bars, fmt="%.0f", fontsize=8)
    second.set_ylabel("peak memory of a step, MiB")
    return figure


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **TRAINING_DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}[/dim]")
    if script.model_name_or_path is None:
        console.print(f"[dim]{SMOLLM2_LICENCE}[/dim]")
        script.model_name_or_path = str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    train = blocks(texts_of(script.train, "train"), tokenizer, script.block_size)
    tests = {}
    for domain in dict.fromkeys([script.train, script.other]):
        rows = blocks(texts_of(domain, "test"), tokenizer, script.block_size)
        tests[domain] = rows.select(range(min(script.num_test, len(rows))))
    teacher = load_model(script.model_name_or_path)

    results = {}
    for name in MODELS:
        console.print(f"[bold]{MODELS[name]}[/bold]")
        set_seed(args.seed)  # the same order of the rows for both students
        model = (
            teacher if name == "teacher" else student_from_teacher(teacher, script.student_layers)
        )
        distillation = {}
        if name == "distilled":
            # The losses are computed in pieces of the logits, which never exist as a whole.
            distillation = {
                "teacher": teacher,
                "temperature": script.temperature,
                "kd_weight": script.kd_weight,
                "ce_weight": 1 - script.kd_weight,
            }
        trainer = make_trainer(model, args, train, **distillation)
        start = time.perf_counter()
        if name in ("cross_entropy", "distilled"):
            trainer.train()
        found: dict[str, Any] = {"seconds": time.perf_counter() - start}
        found["layers"] = model.config.num_hidden_layers
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        for domain, rows in tests.items():
            found[domain] = math.exp(trainer.evaluate(rows)["eval_loss"])
        results[name] = found
        console.print(f"  perplexity { {d: round(found[d], 1) for d in tests} }", highlight=False)
        del trainer, model

    memory: dict[str, int | None] = {}
    if script.memory_rows:
        for kind, chunked in (("whole logits", False), ("chunked", None)):
            console.print(f"[bold]memory of a step, {kind}[/bold]")
            memory[kind] = step_memory(script, args, teacher, train, chunked)
    if args.process_index != 0:
        return

    rows = [["model", "layers", "parameters", *tests, "seconds"]]
    for name, found in results.items():
        perplexities = [f"{found[domain]:.1f}" for domain in tests]
        trained = f"{found['seconds']:.0f}" if found["seconds"] >= 0.5 else "–"
        rows.append(
            [MODELS[name], str(found["layers"]), f"{found['parameters'] / 1e6:.1f}M",
             *perplexities, trained]
        )  # fmt: skip
    steps = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs} epochs"
    legend = (
        f"Perplexity per token on {script.num_test} rows of {script.block_size} tokens; trained "
        f"for {steps} on {script.train}."
    )
    if all(memory.values()) and memory:
        tokens = script.memory_rows * script.block_size
        sizes = " and ".join(f"{value / 2**20:.0f} MiB ({k})" for k, value in memory.items())
        legend += f" Peak memory that a step of {tokens} tokens adds: {sizes}."
    document = {"models": results, "memory": memory}
    figures = {"perplexity.png": plot(results, memory)}
    report(rows, legend, document, figures, Path(args.output_dir), console)


if __name__ == "__main__":
    run(main)
