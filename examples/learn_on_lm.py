"""A language model learns how text messages are written. What becomes of its newspaper English?

Trains LoRA adapters of SmolLM2-135M-Instruct on SMS with TRL's SFTTrainer, at a rate that makes it
forget: once as any script would (plain), and once with one line, which brings rows of newspaper
text beside the new ones (replay), with the starting model as their teacher. The perplexity is
measured on SMS, on newspaper text and on movie reviews, which nothing is trained on.

    python examples/learn_on_lm.py --bf16 true --use_cpu true
    python examples/learn_on_lm.py --ratio 0.25 --kl_weight 0 --max_steps 200
    python examples/learn_on_lm.py --model_name_or_path FOLDER_OR_HUB_ID

Measured with the first command (seed 42; perplexity of SMS, newspaper text and reviews): 365, 108,
148 at the start; 163, 116, 138 plain; 186, 73, 113 with the line. The line keeps the newspaper
English and improves it, for a part of what is learnt. Four minutes of CPU time.

docs/results.md has what replay and the teacher keep over three seeds, and
benchmarks/forgetting_language_model.py compares more methods. Needs the packages trl, peft and, for
the default weights, gguf. The adapters are saved in --output_dir. Every option of SFTConfig can be
given as well.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_adapt import AdaptationCallback
from hf_adapt.continual import KeepPredictions, Replay, ReplayMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # what the examples share
from domain_data import LICENCES
from experiment import option, parse, run
from language_models import TEXTS, texts_of
from model_weights import SMOLLM2_LICENCE, smollm2_path

try:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    sys.exit(f'error: {error}. This example needs: pip install "trl>=0.24" "peft>=0.17"')

TRAINING_DEFAULTS = {
    "output_dir": "runs/learn_on_lm",
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "warmup_steps": 5,
    "max_length": 48,
    "gradient_checkpointing": False,
}


@dataclass
class ExampleArguments:
    train: str = option("sms", f"Texts to learn. {LICENCES['spam2']}", choices=TEXTS)
    general: str = option("nyt", f"Texts of the memory. {LICENCES['vader4']}", choices=TEXTS)
    other: str = option("movies", "Texts that are tested only", choices=TEXTS)
    model_name_or_path: str | None = option(None, f"Folder or hub id. Default: {SMOLLM2_LICENCE}")
    num_test: int = option(48, "Test texts of each domain")
    memory_size: int = option(64, "General texts that are kept")
    ratio: float = option(0.5, "Texts of the memory beside each new one")
    kl_weight: float = option(1.0, "Factor of the divergence from the starting model; 0: none")


def texts(domain: str, split: str, most: int | None = None) -> Dataset:
    return Dataset.from_dict({"text": texts_of(domain, split)[:most]})


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, SFTConfig, **TRAINING_DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}\n{LICENCES['spam2']}\n{SMOLLM2_LICENCE}[/dim]")
    path = script.model_name_or_path or str(smollm2_path())
    domains = (script.train, script.general, script.other)
    memory = ReplayMemory.from_dataset(texts(script.general, "train"), size=script.memory_size)
    for name in ("plain", "with replay"):
        set_seed(args.seed)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            args,
            train_dataset=texts(script.train, "train"),
            eval_dataset={each: texts(each, "test", script.num_test) for each in domains},
            processing_class=AutoTokenizer.from_pretrained(path),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )

        def show(name: str, trainer: SFTTrainer = trainer) -> None:
            found = trainer.evaluate()
            loss = {each: found[f"eval_{each}_loss"] for each in domains}
            values = ", ".join(f"{each} {math.exp(value):.1f}" for each, value in loss.items())
            console.print(f"{name}: perplexity of {values}", highlight=False)

        if name == "plain":
            show("at the start")
        else:
            keep = KeepPredictions(script.kl_weight, on="replay")
            trainer.add_callback(AdaptationCallback(Replay(memory, script.ratio), keep))
        trainer.train()
        show(name)
    trainer.save_model()
    console.print(f"The adapters that were trained with replay are in {args.output_dir}.")


if __name__ == "__main__":
    run(main)
