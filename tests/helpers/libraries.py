"""Trainers of TRL and of sentence-transformers around tiny models."""

import importlib
from typing import Any

import peft
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.helpers.data import chats, completions, sentence_pairs, texts
from tests.helpers.models import llama
from tests.helpers.tokenizers import chat_template, word_tokenizer
from tests.helpers.trainers import BATCH

SPECIAL = ["[PAD]", "[UNK]", "<s>", "</s>", "user:", "assistant:"]
WORDS = [f"w{i}" for i in range(64 - len(SPECIAL))]

SFT_DATA: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "text": (texts(6), texts(35), {}),
    "completion": (completions(6), completions(35), {}),
    "completion-and-text": (completions(6), texts(35), {"completion_only_loss": True}),
    "assistant": (chats(6), chats(35), {"assistant_only_loss": True}),
    "assistant-and-text": (chats(6), texts(35), {"assistant_only_loss": True}),
}


def sft(folder: Any, train: Any, lora: bool = False, **settings: Any) -> SFTTrainer:
    """The SFTTrainer of a LLaMA, for two steps."""
    config = None
    if lora:
        config = peft.LoraConfig(
            r=2, lora_dropout=0.0, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
    tokenizer = word_tokenizer(WORDS, SPECIAL, single=None, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template("</s>")
    # TRL turns bf16 and gradient checkpointing on; tiny models on a CPU need neither.
    defaults = {"bf16": False, "gradient_checkpointing": False, "max_length": 32}
    args = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=BATCH,
        **{**defaults, "max_steps": 2, **settings},
    )
    return SFTTrainer(
        model=llama(),
        args=args,
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        processing_class=tokenizer,
        peft_config=config,
    )


def encoder(folder: Any) -> Any:
    """A tiny sentence-transformer: BERT, mean pooling."""
    path = folder / "encoder"
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(["[CLS]", "[SEP]", "[MASK]", *SPECIAL, *WORDS]))
    tokens = BertTokenizerFast(vocab_file=str(path / "vocab.txt"), model_max_length=32)
    tokens.save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=80,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(path)
    return importlib.import_module("sentence_transformers").SentenceTransformer(
        str(path), device="cpu"
    )


def sentence_trainer(folder: Any, loss: str, score: str | None, **settings: Any) -> Any:
    """The trainer of a sentence-transformer with a loss of its library, for three steps."""
    model = encoder(folder)
    library = importlib.import_module("sentence_transformers")
    losses_of = importlib.import_module("sentence_transformers.losses")
    return library.SentenceTransformerTrainer(
        model=model,
        args=library.SentenceTransformerTrainingArguments(
            output_dir=str(folder / "out"),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            max_steps=3,
            per_device_train_batch_size=BATCH,
            **settings,
        ),
        train_dataset=sentence_pairs(0, score),
        eval_dataset=sentence_pairs(0, score),
        loss=getattr(losses_of, loss)(model),
    )
