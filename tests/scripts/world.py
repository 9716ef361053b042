"""What all shortened scripts share: words of two domains, a tokenizer, facts, quiet arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer

from hf_adapt.knowledge import KnowledgeGraph
from tests.helpers.data import words
from tests.helpers.tokenizers import BERT_SPECIAL, chat_template, word_tokenizer

SPECIAL = [*BERT_SPECIAL, "user:", "assistant:"]
WORDS = [f"w{i}" for i in range(57)]
VOCABULARY = len(SPECIAL) + len(WORDS)
STEPS = 4


@dataclass
class Script:
    """What a script has made when it comes to `trainer.train()`.

    Attributes:
        trainer: The Trainer as the script built it.
        target: Rows of another domain, prepared as the training rows were.
        teacher: A model of the same kind with other weights.
        load: Loads the saved model as a plain one, and fails where a weight is missing.
        text_column: The column(s) with the text, as they were tokenised; None where the rows have
            tokens alone, or a column "text".
        teacher_settings: What distilling needs to know beside the teacher.
    """

    trainer: Trainer
    target: Any
    teacher: nn.Module
    load: Callable[[str], nn.Module]
    text_column: str | Sequence[str] | None = None
    teacher_settings: dict[str, Any] = field(default_factory=dict)


def sentences(number: int, low: int = 0) -> list[str]:
    """Sentences of ragged length; most name an entity of the graph."""
    return [words(i, low, 3 + i % 4) for i in range(number)]


def graph() -> KnowledgeGraph:
    """Facts about words of both domains."""
    names = {f"e{i}": f"w{3 * i}" for i in range(18)}
    return KnowledgeGraph.from_triples(
        [(f"e{i}", "near", f"e{(i + 5) % 18}") for i in range(18)], names=names
    )


def tokenizer(causal: bool = False) -> PreTrainedTokenizerFast:
    """One number a word; encoders get [CLS] and [SEP] around a text or a pair."""
    single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    ends: dict[str, Any] = {}
    if causal:
        single, pair = None, None
        names = ["input_ids", "attention_mask"]  # before transformers 5 there are token types too
        ends = {"bos_token": "[CLS]", "eos_token": "[SEP]", "model_input_names": names}
    made = word_tokenizer(WORDS, SPECIAL, single, pair, model_max_length=32, **ends)
    made.chat_template = chat_template("[SEP]")
    return made


def quiet(folder: Path, **settings: Any) -> dict[str, Any]:
    """Arguments of a short run on the CPU with a checkpoint in the middle of its first epoch."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": STEPS // 2,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "dataloader_pin_memory": False,
        **settings,
    }


def plain(cls: Any) -> Callable[[str], nn.Module]:
    """Loads with `from_pretrained`, and fails where weights are missing or left over."""

    def load(folder: str) -> nn.Module:
        model, info = cls.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        return model

    return load


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    """A model with the same weights each time."""
    torch.manual_seed(seed)
    return make()
