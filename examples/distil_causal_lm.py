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

import copy
import gc
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from distil_classifier import report, size_of
from domain_data import LICENCES, DataError, load_domain
from domain_shift_text import option
from matplotlib.figure import Figure
from model_weights import SMOLLM2_LICENCE, smollm2_path
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
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

DOMAINS = ("movies", "tweets", "products", "nyt")
MODELS = {
    "teacher": "teacher",
    "before": "student, not trained",
    "cross_entropy": "student, cross-entropy",
    "distilled": "student, distilled",
}

# Every other TrainingArgument keeps its own default; all can be given on the command line.
TRAINING_DEFAULTS = {
    "output_dir": "runs/distil_causal_lm",
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "learning_rate": 3e-4,
    "warmup_steps": 5,
    "logging_steps": 10,
    "disable_tqdm": True,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
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


def texts_of(domain: str, split: str) -> list[str]:
    return [text for text, _ in load_domain("vader4", domain)[split]]


def load_model(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


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

    peak: int | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        self.start = _restarted_peak()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.peak = None if self.start is None else _peak() - self.start


def _restarted_peak() -> int | None:
    """Forget the highest memory so far; returns what is held now. None where it cannot be told."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is held now
        return _peak()
    except OSError:
        return None


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")
    )
    return 1024 * int(line.split()[1])


def step_memory(
    script: ExampleArguments,
    args: TrainingArguments,
    teacher: PreTrainedModel,
    train: Dataset,
    chunked: bool | None,
) -> int | None:
    """Of the second step: the first one also makes the optimizer's moments."""
    args = copy.copy(args)
    args.max_steps, args.per_device_train_batch_size = 2, script.memory_rows
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
    return memory.peak


# ---------------------------------------------------------------- report
def plot(results: dict[str, dict], memory: dict[str, int | None], path: Path) -> None:
    """Bars of the perplexities, and of the memory of a step."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    first, second = figure.subplots(1, 2, width_ratios=[2.2, 1])
    domains = [name for name in next(iter(results.values())) if name in DOMAINS]
    for offset, (domain, colour) in enumerate(zip(domains, ("#9aa5b1", "#2a78c2"), strict=False)):
        bars = first.bar(
            [i + 0.4 * offset for i in range(len(results))],
            [found[domain] for found in results.values()],
            width=0.38,
            color=colour,
            label=domain,
        )
        first.bar_label(bars, fmt="%.3g", fontsize=8)
    ticks = [MODELS[name].replace(", ", ",\n") for name in results]
    first.set_xticks([i + 0.2 for i in range(len(results))], ticks, fontsize=8)
    first.set_yscale("log")
    first.set_ylabel("perplexity")
    first.legend(frameon=False, fontsize=8)
    known = {name: value / 2**20 for name, value in memory.items() if value is not None}
    bars = second.bar(list(known), list(known.values()), color="#c25d2a", width=0.5)
    second.bar_label(bars, fmt="%.0f", fontsize=8)
    second.set_ylabel("peak memory of a step, MiB")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((ExampleArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(**TRAINING_DEFAULTS)
    script, args = parser.parse_args_into_dataclasses(argv)
    console = Console(quiet=args.process_index != 0)
    transformers.logging.disable_progress_bar()
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
        found["parameters"] = size_of(model)
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

    output_dir = Path(args.output_dir)
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
    report(rows, legend, {"models": results, "memory": memory}, output_dir, console)
    plot(results, memory, output_dir / "perplexity.png")
    console.print(f"wrote results.json, table.md and perplexity.png to {output_dir}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
