"""Tiny random models and data for the tests: no network, no files, milliseconds a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY = 64
FIVE = int(transformers.__version__.split(".")[0]) >= 5
"""Some of what the plain Trainer gets wrong in 4.57 (resume, counting) is right from 5.0 on."""
SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
Rows = list[dict[str, Any]]


def bert(head: str = "sequence", dropout: bool = False, seed: int = 0, **config: Any) -> Any:
    """A two-layer BERT with a classification head over rows or tokens."""
    torch.manual_seed(seed)
    chosen = {**SIZE, **({} if dropout else NO_DROPOUT), "num_labels": 3, **config}
    settings = BertConfig(vocab_size=VOCABULARY, **chosen)
    classes = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification}
    return classes[head](settings)


def llama(seed: int = 0) -> LlamaForCausalLM:
    """A two-layer LLaMA, which has no dropout."""
    torch.manual_seed(seed)
    tokens = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZE, **tokens))


def rows(
    number: int, seed: int, labels: str | None = "row", low: int = 5, high: int = VOCABULARY
) -> datasets.Dataset:
    """Rows of random tokens of ragged length.

    Args:
        number: How many.
        seed: Seed of the tokens.
        labels: None, "row" (one of three classes), "token" (one per token, some -100) or "lm"
            (the tokens themselves).
        low: Smallest token id: another one makes another domain.
        high: One more than the largest token id.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(start: int, stop: int, size: int) -> list[int]:
        return torch.randint(start, stop, (size,), generator=generator).tolist()

    made: Rows = []
    for _ in range(number):
        length = integers(4, 11, 1)[0]
        row: dict[str, Any] = {"input_ids": integers(low, high, length)}
        row["attention_mask"] = [1] * length
        if labels == "row":
            row["labels"] = integers(0, 3, 1)[0]
        elif labels == "token":
            row["labels"] = [-100 if x == 3 else x for x in integers(0, 4, length)]
        elif labels == "lm":
            row["labels"] = list(row["input_ids"])
        made.append(row)
    return datasets.Dataset.from_list(made)


def collate(features: Rows, length: int | None = None) -> dict[str, torch.Tensor]:
    """Pad tokens with 0 and token labels with -100, to the longest row or to `length`."""
    longest = length or max(len(row["input_ids"]) for row in features)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[key], *[value] * (longest - len(row[key]))] for row in features])

    batch = {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0)}
    if "labels" in features[0]:
        ragged = isinstance(features[0]["labels"], list)
        batch["labels"] = (
            padded("labels", -100) if ragged else torch.tensor([row["labels"] for row in features])
        )
    return batch


def arguments(
    folder: Path | str, cls: type[TrainingArguments] = TrainingArguments, **settings: Any
) -> TrainingArguments:
    """Training arguments for a quiet, deterministic run on the CPU."""
    return cls(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "dataloader_pin_memory": False,
            **settings,
        }
    )


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of a model's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class GradientRecorder(TrainerCallback):
    """Keeps the model's gradient of each optimizer step, before the optimizer uses it."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self.model = model
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Flatten all gradients."""
        model = self.model if self.model is not None else kwargs["model"]
        self.gradients.append(flat_gradient(model))


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients of a model as one float64 vector."""
    return torch.cat(
        [
            (p.grad if p.grad is not None else torch.zeros_like(p)).detach().double().flatten()
            for p in model.parameters()
            if p.requires_grad
        ]
    ).clone()


def cosine_and_ratio(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Cosine similarity and ratio of norms of two gradients."""
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    return float(cosine), float(one.norm() / other.norm())


Maker = Callable[[], Any]
