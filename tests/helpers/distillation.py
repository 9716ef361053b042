"""Distillation of a tiny classifier, and two tokenizers that agree on no number."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_adapt import DistillationTrainer
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.tokenizers import BERT_SPECIAL, word_tokenizer
from tests.helpers.trainers import arguments

WORDS = [f"w{i}" for i in range(40)]


def tokenizer(reverse: bool = False, bert_like: bool = True) -> PreTrainedTokenizerFast:
    """Words to ids, in either order: two tokenizers that agree on no id."""
    single, pair = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]") if bert_like else (None, None)
    return word_tokenizer(WORDS[::-1] if reverse else WORDS, BERT_SPECIAL[:4], single, pair)


def texts(number: int) -> list[str]:
    """Sentences of ragged length."""
    return [" ".join(WORDS[(3 * i + j) % 40] for j in range(3 + i % 4)) for i in range(number)]


def make(folder: Path, cls: Any = DistillationTrainer, **options: Any) -> Any:
    """A Trainer of a student and a teacher; `settings` are training arguments."""
    settings = options.pop("settings", {})
    return cls(
        **{
            "model": bert(seed=0),
            "teacher": bert(seed=1),
            "args": arguments(folder, **settings),
            "train_dataset": rows(12, 1),
            "data_collator": collate,
            **options,
        }
    )


def save_teacher(folder: Path) -> Path:
    """Save a classifier and its tokenizer."""
    bert(seed=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
