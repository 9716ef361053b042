"""A language model learns how text messages are written. What becomes of its newspaper English?

Trains LoRA adapters of SmolLM2-135M-Instruct on SMS, at a rate that makes it forget: once as any
script would (plain), once with rows of newspaper text beside the new ones (replay), and once with
the starting model, which is the model with its adapters off, as a teacher on those rows too. The
perplexity is measured on SMS, on newspaper text and on movie reviews, which nothing is trained on.

    python examples/learn_on_lm.py --bf16 true --use_cpu true
    python examples/learn_on_lm.py --ratio 0.25 --kl_weight 2 --max_steps 200
    python examples/learn_on_lm.py --model_name_or_path FOLDER_OR_HUB_ID

Measured with the first command (one seed; perplexity of SMS / newspaper / reviews): start 336 / 99
/ 123, plain 150 / 127 / 157, replay 162 / 76 / 111, replay + KL 163 / 74 / 100. So plain training
forgets, and 64 rows keep all of it, for a tenth of what is learnt. Five minutes of CPU time.

benchmarks/forgetting_language_model.py compares more methods over seeds. Needs the packages peft
and, for the default weights, gguf. Writes results.json and table.md to --output_dir. Every option
of TrainingArguments can be given as well.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from hf_adapt import Adaptation, AdaptationCallback
from hf_adapt.continual import KeepPredictions, Replay, ReplayMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import LICENCES
from experiment import option, parse, run
from language_models import TEXTS, lora_trainer, perplexities, rows_of
from model_weights import SMOLLM2_LICENCE, smollm2_path
from results import report

TRAINING_DEFAULTS = {
    "output_dir": "runs/learn_on_lm",
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
}


@dataclass
class ExampleArguments:
    train: str = option("sms", f"Texts to learn. {LICENCES['spam2']}", choices=TEXTS)
    general: str = option("nyt", f"Texts of the memory. {LICENCES['vader4']}", choices=TEXTS)
    other: str = option("movies", "Texts that are tested only", choices=TEXTS)
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {SMOLLM2_LICENCE}")
    rank: int = option(16, "Rank of the adapters")
    block_size: int = option(48, "Tokens of a row")
    num_test: int = option(48, "Test rows of each domain")
    memory_size: int = option(64, "Rows of the general texts that are kept")
    ratio: float = option(0.5, "Rows of the memory beside each new row")
    kl_weight: float = option(1.0, "Factor of the divergence from the starting model")


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **TRAINING_DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}\n{LICENCES['spam2']}\n{SMOLLM2_LICENCE}[/dim]")
    path = script.model_name_or_path or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    names = [script.train, script.general, script.other]
    tests = {n: rows_of(n, "test", tokenizer, script.block_size, script.num_test) for n in names}
    train, general = (rows_of(n, "train", tokenizer, script.block_size) for n in names[:2])

    memory = ReplayMemory.from_dataset(general, size=script.memory_size)
    methods: dict[str, list[Adaptation] | None] = {
        "start": None,
        "plain": [],
        "replay": [Replay(memory, script.ratio)],
        "replay + KL": [
            Replay(memory, script.ratio),
            KeepPredictions(script.kl_weight, on="replay"),
        ],
    }
    found: dict[str, dict[str, float]] = {}
    for method, adaptations in methods.items():
        trainer = lora_trainer(path, script.rank, args, train)
        if adaptations:
            trainer.add_callback(AdaptationCallback(*adaptations))
        if adaptations is not None:
            trainer.train()
        found[method] = perplexities(trainer, tests)
        shown = {name: round(value, 1) for name, value in found[method].items()}
        console.print(f"{method}: perplexity {shown}", highlight=False)
    if args.process_index != 0:
        return
    rows = [["method", *names]]
    rows += [[name, *(f"{value:.1f}" for value in each.values())] for name, each in found.items()]
    legend = (
        f"Perplexity per token; {args.max_steps} steps on {script.train}. Replay brings "
        f"{100 * script.ratio:g} rows of {script.general} for 100 new ones, of {len(memory)}."
    )
    report(rows, legend, {"perplexity": found}, {}, Path(args.output_dir), console)


if __name__ == "__main__":
    run(main)
