"""Language modelling on the target's own text: beside the task, or as a stage before it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.engine.adaptation import Objective, Term
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.streams import TARGET
from hf_adapt.engine.trainer_kinds import refuse_sentence_trainer
from hf_adapt.models.hashing import mixed_bits, row_hash
from hf_adapt.models.heads import has_head
from hf_adapt.models.language_model import (
    NEW_HEAD_RATE,
    LanguageModelHead,
    language_model_kind,
    load_language_model,
)
from hf_adapt.models.logits import lacks_logits, projected_logits
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from hf_adapt.engine.batch import Batch, Rows
    from hf_adapt.engine.parts import Part

logger = logging.getLogger(__name__)

INSTEAD = "Use an objective on features or predictions (MMD, DANN, InformationMaximization)."


class MaskedTokens(NamedTuple):
    """Tokens for masked language modelling.

    Attributes:
        input_ids: (B, T), with masks and random tokens in place of some.
        labels: (B, T): the token that stood there, -100 where it was not chosen.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


def mask_tokens(
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
    probability: float = 0.15,
    seed: int = 0,
) -> MaskedTokens:
    """Choose tokens to predict; of these 80 % are masked, 10 % replaced and 10 % kept.

    A pure function: each choice depends on the seed, the tokens of the row and the position in it,
    and neither on padding nor on the other rows.

    Reference:
        Devlin et al. 2019, "BERT", section 3.1, arXiv:1810.04805.

    Args:
        input_ids: The tokens.
        mask: 1 on real tokens; None if all are.
        tokenizer: Gives the mask token, the special tokens, which are never chosen, and the number
            of tokens from which replacements are drawn.
        probability: Share of the tokens that are chosen.
        seed: Another seed chooses others.

    Shape:
        - input_ids, mask: (B, T).

    Example:
        ```python
        inputs, labels = mask_tokens(batch["input_ids"], batch["attention_mask"], tokenizer)
        ```
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    special = torch.tensor(tokenizer.all_special_ids, device=input_ids.device)
    drawn = mixed_bits(row_hash(input_ids, real).unsqueeze(1) + 7919 * real.long().cumsum(1))
    drawn = mixed_bits(drawn + seed)
    chosen = real & ~torch.isin(input_ids, special)
    chosen = chosen & ((drawn & 0xFFFFFF) < int(probability * 2**24))
    kind = (drawn >> 24) & 0xFFFF
    other = (mixed_bits(drawn + 1) & 0x7FFFFFFF) % len(tokenizer)
    changed = torch.where(kind < int(0.8 * 2**16), cast(int, tokenizer.mask_token_id), other)
    changed = torch.where(kind < int(0.9 * 2**16), changed, input_ids)
    return MaskedTokens(
        torch.where(chosen, changed, input_ids).to(input_ids.dtype),
        torch.where(chosen, input_ids, IGNORED),
    )


def step_seed(trainer: Trainer) -> int:
    """A seed for the optimizer step under way, the same in every process and after resuming."""
    return 1_000_003 * trainer.args.seed + trainer.state.global_step


class TargetLanguageModeling(Objective):
    r"""Language modelling of the target's text beside the task: the model learns its language.

    .. math::
        L = \lambda \, L_{\mathrm{task}} + (1 - \lambda) \frac{1}{|M|} \sum_{i \in M}
            -\log p(x_i \mid \tilde x), \qquad \lambda = \frac{n_s}{n_s + n_t}

    with n_s source and n_t target rows in a batch. Encoders predict masked tokens M, decoders each
    next token. Use it where there is much text of the target, in words or a style that the model
    does not know, and time for some thousand steps; with a few hundred rows and one or two epochs
    [`InformationMaximization`] or self-training does more. [`adapt_pretrain`] before the task is
    the thorough way; the paper does both.

    An encoder sees the target's rows masked, in a forward of their own, and unmasked only where
    another objective reads them. Beside other terms with factors of their own pass a `weight`: the
    shares would halve the task's loss, and not those terms.

    The head: a language model has its own, and a decoder with tied embeddings needs none. Else it
    is the head of the checkpoint, where `model.name_or_path` has one (`bert-base-uncased`, or what
    [`adapt_pretrain`] saved), or a new one over the model's embeddings.
    Either is trained beside the model, which is saved without it.

    Reference:
        Karouzos et al. 2021, "UDALM: Unsupervised Domain Adaptation through Language Modeling",
        Eq. 3, arXiv:2104.07078.
        Deviation: the shares are those of the rows that travel together (1 / (1 + ratio) of the
        target stream), and each loss is the mean over all its items of an optimizer step.

    Args:
        weight: None for the shares of the paper. A number or schedule is the factor of this term
            alone; the task's loss then keeps the factor 1.
        mask_probability: Share of the tokens to predict (encoders).
        warmup: Share of the run in which a new head is trained alone: its gradient does not reach
            the model. On MiniLM and tweets it took about 15 steps of 16 rows to predict as well as
            the words' frequencies do, and 60 to do clearly better. A head that was trained before
            has none.
        tokenizer: The tokenizer of the rows; by default the Trainer's `processing_class`.
        learning_rate: Peak learning rate of the head; by default 3e-3 for a new one, and the
            model's for one that was trained before.
        name: Prefix of the logs.

    Logs:
        `loss/target_language_modeling` (nats per token; its exponential is the perplexity).

    Raises:
        ValueError: If an option is out of range; on training, if the model or its batches have no
            tokens, or the tokenizer no mask.

    Example:
        >>> TargetLanguageModeling(mask_probability=0.3).name
        'target_language_modeling'
    """

    name = "target_language_modeling"
    needs_streams = (TARGET,)

    def __init__(
        self,
        weight: float | Schedule | None = None,
        mask_probability: float = 0.15,
        warmup: float = 0.2,
        tokenizer: PreTrainedTokenizerBase | None = None,
        learning_rate: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(1.0 if weight is None else weight, pooling="tokens", name=name)
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability={mask_probability} must lie between 0 and 1.")
        if not 0 <= warmup < 1:
            raise ValueError(
                f"warmup={warmup} must be a share of the run, at least 0 and below 1: with 1 the "
                "model would never be trained by this term."
            )
        self.has_shares = weight is None
        self.mask_probability = mask_probability
        self.warmup = warmup
        self.tokenizer = tokenizer
        self._given_rate = learning_rate
        self._source_share = 0.5
        self._has_own_head = self._is_masked = self._is_new = False

    def base_weight(self, progress: float) -> float:
        """The source's share, unless a weight was given."""
        return self._source_share if self.has_shares else 1.0

    def term_weight(self, progress: float) -> float:
        """The target's share, or the weight that was given."""
        return 1 - self._source_share if self.has_shares else super().term_weight(progress)

    def reads_first_forward(self, trainer: Trainer) -> bool:
        """Decoders do; encoders see the target's rows masked."""
        refuse_sentence_trainer(trainer, type(self).__name__, INSTEAD)
        return language_model_kind(cast(nn.Module, trainer.model)) == "causal_lm"

    def setup(self, trainer: Trainer) -> None:
        """Refuse what has no tokens to predict.

        Raises:
            ValueError: If the model or the tokenizer does not fit.
        """
        model = unwrapped_base(cast(nn.Module, trainer.model))
        kind = language_model_kind(model)
        self._is_masked, self._has_own_head = kind == "masked_lm", has_head(model, kind)
        self.uses_logits = self._has_own_head
        if self._is_masked:
            self._tokenizer = self._usable_tokenizer(trainer, model)
        if not self._has_own_head and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ValueError(
                f"{type(self).__name__} ties its head to the model's embeddings, which FSDP and "
                "DeepSpeed may split. Use plain data parallelism, or adapt_pretrain before the "
                "task."
            )
        self._trainer = trainer

    def _usable_tokenizer(self, trainer: Trainer, model: nn.Module) -> PreTrainedTokenizerBase:
        given: Any = self.tokenizer or trainer.processing_class
        given = getattr(given, "tokenizer", given)  # that of a processor
        if not hasattr(given, "all_special_ids"):
            raise ValueError(
                f"{type(self).__name__} needs the tokenizer of the rows, found "
                f"{type(given).__name__}. Pass Trainer(processing_class=tokenizer), or tokenizer= "
                "here."
            )
        if given.mask_token_id is None:
            raise ValueError(
                f"{type(given).__name__} has no mask token, and {type(model).__name__} is an "
                "encoder, which predicts masked tokens. Use the tokenizer of the checkpoint."
            )
        return cast("PreTrainedTokenizerBase", given)

    def build_modules(self, batch: Batch) -> nn.Module | None:
        """The head, where the model has none."""
        ratio = batch.ratio(TARGET)
        self._source_share = 1 / (1 + ratio)
        for part in batch.parts:
            _tokens(part)
        base = unwrapped_base(batch.model)
        tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
        if self._has_own_head or (not self._is_masked and tied):
            return None
        loaded = load_language_model(base) if self._is_masked else None
        head = None if loaded is None else LanguageModelHead.of(loaded)
        self._is_new = head is None
        rate = NEW_HEAD_RATE if self._is_new else self._trainer.args.learning_rate
        self.learning_rate = rate if self._given_rate is None else self._given_rate
        if head is not None:
            logger.info("%s: the head is that of %s.", self.name, base.name_or_path)
            return head
        hidden, _ = batch.features()
        embeddings = self._embeddings(batch)
        return LanguageModelHead(hidden.shape[1], embeddings.shape[1], len(embeddings))

    def state_dict(self) -> dict[str, Any]:
        """Whether the head was new when the run began."""
        return {"is_new": self._is_new}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it: a head that is found beside another checkpoint ends no warm-up."""
        self._is_new = state["is_new"]

    # ---- the tokens to predict ----

    def _mask(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> MaskedTokens:
        seed = step_seed(self._trainer)
        return mask_tokens(input_ids, mask, self._tokenizer, self.mask_probability, seed)

    def _masked_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model sees of target rows."""
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        return {**inputs, "input_ids": self._mask(inputs["input_ids"], mask).input_ids}

    def _labels(self, rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each part the tokens to predict at each position of its target rows, (B, T).

        Returns:
            The labels, -100 where nothing is predicted, and which positions are items of the model.
        """
        found = []
        for part in rows.parts:
            kept = rows.is_in(part.domain)
            ids, mask = _tokens(part)[kept], part.attention_mask
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[kept].bool()
            if self._is_masked:
                labels = self._mask(ids, real).labels
            else:
                labels = F.pad(ids.masked_fill(~real, IGNORED)[:, 1:], (0, 1), value=IGNORED)
                labels = labels.masked_fill(~real, IGNORED)
            if part.added is not None:  # no items of this head; they are masked nowhere either
                real = real & ~part.added[kept]
                labels = labels.masked_fill(~real, IGNORED)
            found.append((labels, real))
        return found

    def num_items(self, rows: Rows) -> torch.Tensor:
        """The tokens to predict."""
        return torch.stack([labels.ne(IGNORED).sum() for labels, _ in self._labels(rows)]).sum()

    # ---- the loss ----

    def loss(self, batch: Batch) -> Term:
        """The cross-entropy of the tokens, summed, and their number; (0, 0) without one."""
        found = self._labels(batch)
        labels = torch.cat([each[real] for each, real in found])
        chosen = labels != IGNORED
        warms_up = self._is_new and batch.progress < self.warmup
        with torch.no_grad() if warms_up else nullcontext():
            seen = batch.forward(self._masked_inputs, (TARGET,)) if self._is_masked else batch
            if not seen.parts:
                return torch.zeros((), device=labels.device), chosen.sum()
            # TRL runs language models without logits.
            has_scores = self._has_own_head and not lacks_logits(seen.parts[0].outputs)
            if has_scores:
                values = self._own_scores(seen, found)
            else:
                hidden, domain = seen.features()
                values = hidden[seen.is_in(domain)][chosen]
        scores = values if has_scores else self._scores(values, batch, warms_up)
        return F.cross_entropy(scores.float(), labels[chosen], reduction="sum"), chosen.sum()

    def _own_scores(
        self, seen: Batch, found: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """The language model's own scores where there is a token to predict, (N, V)."""
        labels = iter([each for each, _ in found if len(each)])
        scores = []
        for part in seen.parts:
            logits = part.own_tokens(part.logits, seen.model)[seen.is_in(part.domain)]
            scores.append(logits[next(labels) != IGNORED] if len(logits) else logits[:, 0])
        return torch.cat(scores)

    def _scores(self, hidden: torch.Tensor, batch: Batch, warms_up: bool) -> torch.Tensor:
        """The head's scores of hidden states, (N, V)."""
        if self._has_own_head:
            return projected_logits(batch.model, hidden)
        weight = self._embeddings(batch).float()
        weight = weight.detach() if warms_up else weight
        if self.module is None:
            return F.linear(hidden, weight)
        return cast(torch.Tensor, self.module(hidden, weight))

    def _embeddings(self, batch: Batch) -> torch.Tensor:
        base: Any = unwrapped_base(batch.model)
        weight: torch.Tensor = base.get_input_embeddings().weight
        return weight


def _tokens(part: Part) -> torch.Tensor:
    """The tokens of a part, (B, T)."""
    ids = part.inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        found = ", ".join(
            f"{name} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else name
            for name, value in part.inputs.items()
        )
        raise ValueError(
            "TargetLanguageModeling predicts tokens and needs input_ids of shape (B, T); the batch "
            f"has {found}. {INSTEAD}"
        )
    return ids
