"""Language modelling on the target's text as a stage of its own, before the task."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import datasets
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_adapt.alignment.language_modeling import mask_tokens, step_seed
from hf_adapt.models.language_model import (
    NEW_HEAD_RATE,
    language_model_kind,
    language_model_of,
)
from hf_adapt.models.structure import unwrapped_base
from hf_adapt.storage.checkpoints import last_whole_checkpoint

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MOST_TOKENS = 10**6
"""A tokenizer without a limit names a far higher number."""


def adapt_pretrain(
    model: ModelT,
    tokenizer: PreTrainedTokenizerBase,
    target: datasets.Dataset | Sequence[str],
    args: TrainingArguments | None = None,
    mask_probability: float = 0.15,
    warmup: float = 0.1,
    text_column: str = "text",
    max_length: int | None = None,
) -> ModelT:
    """Continue the language modelling of a model's encoder on the target's texts, before its task.

    The encoder (or decoder) is trained inside a language model that shares it; the task's head is
    left as it is. Use it where the target's language is far from what the checkpoint was made of,
    and there are thousands of texts; [`TargetLanguageModeling`] then goes on beside the task, with
    the head that was trained here.

    The language model is saved in `args.output_dir`, and becomes the model's `name_or_path`. If the
    folder holds a checkpoint of an interrupted run, training resumes from it.

    Reference:
        Gururangan et al. 2020, "Don't Stop Pretraining: Adapt Language Models to Domains and
        Tasks", section 4 (TAPT), arXiv:2004.10964.
        Deviation: 10 epochs and the batch size of `args` where the paper has 100 epochs of 256
        rows.

    Args:
        model: Any model with a text encoder or decoder, with or without a head; trained in place.
        tokenizer: Its tokenizer.
        target: Texts, a dataset with a column of texts, or one of tokenised rows (`input_ids`).
            Labels are not looked at.
        args: How to train; `resume_from_checkpoint` there names a checkpoint. By default 10 epochs
            in the folder `adapt_pretrain`, with a learning rate of 1e-4 and a checkpoint an epoch.
        mask_probability: Share of the tokens to predict (encoders).
        warmup: Share of the run in which a head that the checkpoint does not have is trained alone.
        text_column: The column with the text.
        max_length: Tokens of a text that are read; by default as many as the model takes.

    Returns:
        The same model, in the mode that it was in.

    Raises:
        ValueError: If there is no text, one is empty, the tokenizer lacks a token, or the model
            has adapters.

    Example:
        ```python
        adapt_pretrain(model, tokenizer, tweets, TrainingArguments("tweets", num_train_epochs=20))
        Trainer(model, args, train_dataset=labelled_reviews).train()
        ```
    """
    if not 0 < mask_probability < 1 or not 0 <= warmup < 1:
        raise ValueError(
            f"mask_probability={mask_probability} must lie between 0 and 1, and warmup={warmup} be "
            "at least 0 and below 1."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "adapt_pretrain saves a whole language model, and this model has adapters: call it "
            "before get_peft_model."
        )
    masked = language_model_kind(model) == "masked_lm"
    needed = "mask_token" if masked else "pad_token"
    if getattr(tokenizer, needed, None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no {needed}, which language modelling with "
            f"{type(unwrapped_base(model)).__name__} needs."
            + ("" if masked else " Set tokenizer.pad_token = tokenizer.eos_token.")
        )
    rows = _tokenized(target, tokenizer, text_column, max_length or _longest(model, tokenizer))
    args = args or TrainingArguments(
        "adapt_pretrain",
        num_train_epochs=10,
        learning_rate=1e-4,
        per_device_train_batch_size=16,
        save_strategy="epoch",
        save_total_limit=1,
        report_to=[],
    )
    language_model, has_new_head = language_model_of(model)
    was_training = model.training
    trainer = _Pretrainer(
        language_model,
        args,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer)
        if masked
        else DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.mask_probability = mask_probability if masked else 0.0
    if has_new_head:
        trainer.new_head = _outside(language_model)
        trainer.add_callback(_HeadFirst(language_model.base_model, warmup))
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None:
        checkpoint = last_whole_checkpoint(str(args.output_dir))
        if checkpoint is not None:
            logger.warning("adapt_pretrain resumes from %s.", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    model.to(args.device)
    model.train(was_training)
    base: Any = unwrapped_base(model)
    base.name_or_path = base.config.name_or_path = str(args.output_dir)
    return model


class _Pretrainer(Trainer):
    """A Trainer that masks tokens, with a learning rate of its own for a new head.

    The masks are a function of seed, step and row, and not drawn in the collator, whose random
    numbers are others after resuming.
    """

    new_head: Sequence[nn.Parameter] = ()
    mask_probability = 0.0

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        if self.mask_probability:
            epoch_iterator = map(self._masked, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    def _masked(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        tokenizer: Any = self.processing_class
        seed = step_seed(self)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        masked = mask_tokens(ids, mask, tokenizer, self.mask_probability, seed)
        return {**inputs, **masked._asdict()}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        head = {id(parameter) for parameter in self.new_head}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in head]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in head]
                optimizer.add_param_group({**group, "params": own, "lr": NEW_HEAD_RATE})
        return optimizer


class _HeadFirst(TrainerCallback):
    """Leaves out the gradients of the encoder (and of the tied embeddings) for the first steps."""

    def __init__(self, body: nn.Module, share: float) -> None:
        self.body = body
        self.share = share

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradients."""
        if state.global_step < self.share * state.max_steps:
            for parameter in self.body.parameters():
                parameter.grad = None


def _outside(language_model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of the head alone."""
    shared = {id(parameter) for parameter in language_model.base_model.parameters()}
    return [p for p in language_model.parameters() if id(p) not in shared]


def _longest(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that the model takes; None where nothing limits them."""
    config: Any = unwrapped_base(model).config
    positions = getattr(config, "max_position_embeddings", None)
    limits = [tokenizer.model_max_length]
    if positions is not None:
        # RoBERTa's positions begin after that of padding.
        embeddings = getattr(unwrapped_base(model).base_model, "embeddings", None)
        table = getattr(embeddings, "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        limits.append(positions if padding is None else positions - padding - 1)
    return None if min(limits) > MOST_TOKENS else min(limits)


def _tokenized(
    target: datasets.Dataset | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    max_length: int | None,
) -> datasets.Dataset:
    """Rows of tokens without labels."""
    if not isinstance(target, datasets.Dataset):
        if isinstance(target, (str, Mapping)) or not all(isinstance(t, str) for t in target):
            raise ValueError(
                "The target must be a list of texts or a datasets.Dataset, got "
                f"{type(target).__name__}. Of a DatasetDict pass one split."
            )
        target = datasets.Dataset.from_dict({text_column: list(target)})
    if len(target) == 0:
        raise ValueError("The target has no rows, so there is nothing to train on.")
    if "input_ids" in target.column_names:
        return target.select_columns([name for name in INPUTS if name in target.column_names])
    if text_column not in target.column_names:
        raise ValueError(
            f"The target has neither input_ids nor the column {text_column!r}; it has "
            f"{', '.join(target.column_names)}. Name the column of texts: text_column=..."
        )
    texts = target[text_column]
    empty = [number for number, text in enumerate(texts) if not str(text or "").strip()]
    if empty:
        raise ValueError(
            f"{len(empty)} of the target's {len(target)} texts are empty (row {empty[0]} is the "
            f"first). Leave them out: target.filter(lambda row: row[{text_column!r}])."
        )

    def tokens(batch: Mapping[str, list[str]]) -> Mapping[str, Any]:
        made: Mapping[str, Any] = tokenizer(
            batch[text_column], truncation=max_length is not None, max_length=max_length
        )
        return made

    return target.map(tokens, batched=True, remove_columns=target.column_names)
