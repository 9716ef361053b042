"""Language models that learn the texts of a domain: rows of tokens, adapters and perplexities."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from domain_data import load_domain
from experiment import DOMAINS
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

TEXTS = (*DOMAINS, "sms", "email")
"""The domains that have texts."""


def texts_of(domain: str, split: str) -> list[str]:
    """The texts of a domain."""
    return [text for text, _ in load_domain(domain)[split]]


def load_model(path: str) -> PreTrainedModel:
    """A language model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def rows_of(
    domain: str, split: str, tokenizer: PreTrainedTokenizerBase, size: int, most: int | None = None
) -> Dataset:
    """The texts of a domain, a line each, in rows of so many tokens."""
    ids = tokenizer("\n".join(texts_of(domain, split)))["input_ids"]
    rows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)][:most]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def lora_trainer(path: str, rank: int, args: TrainingArguments, rows: Dataset) -> Trainer:
    """A Trainer of new LoRA adapters on every linear layer of a model."""
    from peft import LoraConfig, get_peft_model  # which the other language models do without

    set_seed(args.seed)
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return Trainer(
        model=get_peft_model(load_model(path), config),
        args=args,
        train_dataset=rows,
        data_collator=default_data_collator,
    )


def perplexities(trainer: Trainer, tests: Mapping[str, Any]) -> dict[str, float]:
    """The perplexity of each test set, per token."""
    return {name: math.exp(trainer.evaluate(rows)["eval_loss"]) for name, rows in tests.items()}
