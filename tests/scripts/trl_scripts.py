"""TRL's scripts, shortened: sft in its data formats, with and without LoRA, dpo and reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from tests.helpers.data import words
from tests.helpers.models import SIZE
from tests.scripts.world import VOCABULARY, Script, plain, quiet, seeded, sentences, tokenizer

ROWS = 12


def llama(seed: int = 0, cls: Any = LlamaForCausalLM, **config: Any) -> Any:
    """A two-layer LLaMA."""
    tokens = dict(bos_token_id=2, eos_token_id=3, pad_token_id=0)
    made = LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.1, **SIZE, **tokens, **config)
    return seeded(lambda: cls(made), seed)


def _settings(folder: Path) -> dict[str, Any]:
    # TRL turns bf16 and gradient checkpointing on; tiny models on a CPU need neither.
    return quiet(folder, bf16=False, gradient_checkpointing=False, max_length=32)


def _lora(task: str = "CAUSAL_LM") -> peft.LoraConfig:
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type=task)


def _sft(folder: Path, rows: Any, lora: bool = False, **settings: Any) -> Script:
    train = rows(0)
    trainer = SFTTrainer(
        model=llama(),
        args=SFTConfig(**_settings(folder), **settings),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        processing_class=tokenizer(causal=True),
        peft_config=_lora() if lora else None,
    )

    def load_adapter(saved: str) -> nn.Module:
        return peft.PeftModel.from_pretrained(llama(), saved)

    load = load_adapter if lora else plain(LlamaForCausalLM)
    return Script(trainer, rows(30), llama(1), load)


def _texts(low: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": sentences(ROWS, low)})


def _completions(low: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"prompt": words(i, low, 3), "completion": " " + words(i + 1, low)} for i in range(ROWS)]
    )


def _messages(low: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": words(i, low, 3)},
                    {"role": "assistant", "content": words(i + 1, low)},
                ]
            }
            for i in range(ROWS)
        ]
    )


def sft_text(folder: Path) -> Script:
    """Running text."""
    return _sft(folder, _texts)


def sft_text_lora(folder: Path) -> Script:
    """Running text, with LoRA."""
    return _sft(folder, _texts, lora=True)


def sft_completion(folder: Path) -> Script:
    """Prompts and completions."""
    return _sft(folder, _completions)


def sft_completion_lora(folder: Path) -> Script:
    """Prompts and completions, with LoRA."""
    return _sft(folder, _completions, lora=True)


def sft_messages(folder: Path) -> Script:
    """Chats, of which the assistant's messages are learnt."""
    return _sft(folder, _messages, assistant_only_loss=True)


def _preferences(low: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {
                "prompt": words(i, low, 3),
                "chosen": " " + words(i + 1, low),
                "rejected": " " + words(i + 2, low),
            }
            for i in range(ROWS)
        ]
    )


def dpo(folder: Path) -> Script:
    """Preferences, with a reference model."""
    train = _preferences(0)
    trainer = DPOTrainer(
        model=llama(),
        ref_model=llama(2),
        args=DPOConfig(**_settings(folder)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        processing_class=tokenizer(causal=True),
    )
    return Script(trainer, _preferences(30), llama(1), plain(LlamaForCausalLM))


def reward(folder: Path) -> Script:
    """Preferences, scored by a classifier with one output."""
    train = _preferences(0)
    cls = LlamaForSequenceClassification
    trainer = RewardTrainer(
        model=llama(cls=cls, num_labels=1),
        args=RewardConfig(**_settings(folder)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        processing_class=tokenizer(causal=True),
    )
    return Script(trainer, _preferences(30), llama(1, cls, num_labels=1), plain(cls))
