"""A language model learns how text messages are written. What becomes of its newspaper English?

Trains LoRA adapters of SmolLM2-135M-Instruct on SMS, next token by next token, and measures the
perplexity there and on newspaper editorials, which stand for all that the model could do before:

    plain        as any script would
    kl           holds the predictions for the new rows near those of the start, without other rows
    replay       one row of newspaper text beside every eighth new one
    replay kl    the same rows, and the starting model's predictions for them

Each but the first is one line. The starting model is the model with its adapters off.

    python examples/learn_on_lm.py
    python examples/learn_on_lm.py --ratio 0.25 --kl_weight 2 --max_steps 200
    python examples/learn_on_lm.py --model_name_or_path FOLDER_OR_HUB_ID

Measured with the defaults (30 steps, bf16, one seed; perplexity of SMS / newspaper): start 304 /
94, plain 171 / 102, kl 203 / 86, replay 190 / 73, replay kl 200 / 75. So plain training loses
newspaper English, and each line keeps it, for a part of what is learnt. Four minutes of CPU time.

Needs the packages peft and, for the default weights, gguf. Writes results.json and table.md to
--output_dir. Every option of TrainingArguments can be given as well.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from distil_causal_lm import load_model, texts_of
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    default_data_collator,
    set_seed,
)

from hf_adapt import Adaptation, AdaptationCallback
from hf_adapt.continual import KeepPredictions, Replay, ReplayMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import LICENCES
from experiment import DOMAINS, option, parse, run
from model_weights import SMOLLM2_LICENCE, smollm2_path
from results import report

TRAINING_DEFAULTS = {
    "output_dir": "runs/learn_on_lm",
    "max_steps": 30,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "learning_rate": 2e-3,
    "warmup_steps": 5,
}


TEXTS = (*DOMAINS, "sms", "email")


@dataclass
class ExampleArguments:
    train: str = option("sms", f"Domain to train on. {LICENCES['spam2']}", choices=TEXTS)
    general: str = option("nyt", f"What is to be kept. {LICENCES['vader4']}", choices=TEXTS)
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {SMOLLM2_LICENCE}")
    rank: int = option(16, "Rank of the adapters")
    block_size: int = option(48, "Tokens of a row")
    num_test: int = option(24, "Test rows of each domain")
    memory_size: int = option(64, "Rows of the general domain that are kept")
    ratio: float = option(0.125, "Rows of the memory beside each new row")
    kl_weight: float = option(1.0, "Factor of the divergence from the starting model")


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **TRAINING_DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}\n{LICENCES['spam2']}[/dim]")
    if script.model_name_or_path is None:
        console.print(f"[dim]{SMOLLM2_LICENCE}[/dim]")
        script.model_name_or_path = str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)

    def rows_of(domain: str, split: str) -> Dataset:
        ids, size = tokenizer("\n".join(texts_of(domain, split)))["input_ids"], script.block_size
        rows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return Dataset.from_dict({"input_ids": rows, "labels": rows})

    domains = (script.train, script.general)
    tests = {domain: rows_of(domain, "test") for domain in domains}
    tests = {d: test.select(range(min(script.num_test, len(test)))) for d, test in tests.items()}
    train, general = (rows_of(domain, "train") for domain in domains)
    memory = ReplayMemory.from_dataset(general, size=script.memory_size)

    methods: dict[str, list[Adaptation] | None] = {
        "start": None,
        "plain": [],
        "kl": [KeepPredictions(script.kl_weight)],
        "replay": [Replay(memory, script.ratio)],
        "replay kl": [
            Replay(memory, script.ratio),
            KeepPredictions(script.kl_weight, on="replay"),
        ],
    }
    found: dict[str, dict[str, float]] = {}
    for name, adaptations in methods.items():
        set_seed(args.seed)
        model = load_model(script.model_name_or_path)
        lora = LoraConfig(r=script.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = Trainer(
            model=get_peft_model(model, lora),
            args=args,
            train_dataset=train,
            data_collator=default_data_collator,
        )
        trainer.remove_callback(PrinterCallback)
        if adaptations:
            trainer.add_callback(AdaptationCallback(*adaptations))
        if adaptations is not None:
            trainer.train()
        found[name] = {
            domain: math.exp(trainer.evaluate(test)["eval_loss"]) for domain, test in tests.items()
        }
        shown = {domain: round(value, 1) for domain, value in found[name].items()}
        console.print(f"{name}: perplexity {shown}", highlight=False)
    if args.process_index != 0:
        return
    rows = [["method", *domains]]
    rows += [[name, *(f"{value:.1f}" for value in both.values())] for name, both in found.items()]
    legend = (
        f"Perplexity per token; {args.max_steps} steps on {script.train}. Replay brings "
        f"{100 * script.ratio:g} rows of {script.general} for 100 new ones, of {len(memory)}."
    )
    report(rows, legend, {"perplexity": found}, {}, Path(args.output_dir), console)


if __name__ == "__main__":
    run(main)
