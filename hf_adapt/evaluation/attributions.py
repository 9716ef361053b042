"""Which tokens a prediction rests on, before and after adaptation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_adapt.engine.sweep import evaluating
from hf_adapt.models.structure import unwrapped_base

logger = logging.getLogger(__name__)

LARGEST_ERROR = 0.05
"""As a share of the whole difference; above it more steps are needed."""


@dataclass(frozen=True)
class TokenAttributions:
    """What each token of a text adds to the score of a class.

    Args:
        tokens: The tokens, with those that the tokenizer adds, whose attribution is 0.
        scores: The attribution of each.
        target: The number of the class.
        score: The score of the text: the log-odds of the class.
        baseline_score: The score of a text without words: of padding, or of another such token.
        error: How far the sum of the attributions is from the difference of the two.
    """

    tokens: Sequence[str]
    scores: Sequence[float]
    target: int
    score: float
    baseline_score: float
    error: float


@dataclass(frozen=True)
class AttributionChange:
    """The attributions of one text by two models, for the same class.

    Args:
        before: Those of the first model.
        after: Those of the second.
    """

    before: TokenAttributions
    after: TokenAttributions

    @property
    def change(self) -> list[float]:
        """How much more each token adds in the second model."""
        return [b - a for a, b in zip(self.before.scores, self.after.scores, strict=True)]

    def __str__(self) -> str:
        width = max(map(len, self.before.tokens))
        return "\n".join(
            f"{token:{width}} {a:+8.3f} {b:+8.3f}"
            for token, a, b in zip(
                self.before.tokens, self.before.scores, self.after.scores, strict=True
            )
        )


def token_attributions(
    model: nn.Module, tokenizer: Any, text: str, target: int | None = None, steps: int = 32
) -> TokenAttributions:
    r"""Attribute the score of a class to the tokens of a text, by integrated gradients.

    The score is the log-odds of the class, \(z_c - \log \sum_{k \ne c} e^{z_k}\). The attributions
    add up to its difference from the score of the baseline, in which padding (or a mask, if padding
    is a vector of zeros) takes the place of each token of the text; `error` says how exactly. They
    describe the model, not the truth of the text.

    Reference:
        Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", Eq. 1,
        arXiv:1703.01365, by captum's LayerIntegratedGradients on the input embeddings.

    Args:
        model: A model that classifies a text as a whole; PEFT models as well.
        tokenizer: Its tokenizer.
        text: One text.
        target: The number of the class; the predicted one by default.
        steps: Points at which the gradient is taken.

    Raises:
        ImportError: If captum is not installed.
        ValueError: If the model does not give one row of scores of at least two classes, or the
            text has no tokens.

    Example:
        ```python
        found = token_attributions(model, tokenizer, "The plot was thin, the cast superb.")
        for token, score in zip(found.tokens, found.scores):
            print(f"{token:12} {score:+.2f}")
        ```
    """
    integrated_gradients = _integrated_gradients()
    embeddings = _input_embeddings(model)
    ids, added, inputs = _encoded(tokenizer, text, next(model.parameters()).device)
    baseline = torch.where(added, ids, _baseline_id(tokenizer, embeddings, ids))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        batch = {key: value.expand(len(ids), -1) for key, value in inputs.items()}
        return _checked(model(input_ids=ids, **batch).logits, model)

    with evaluating(model):
        with torch.no_grad():
            whole = logits(ids)
            chosen = int(whole[0].argmax()) if target is None else target
            if not 0 <= chosen < whole.shape[1]:
                raise ValueError(f"target={target}: the model has {whole.shape[1]} classes.")
            # Not the ids of the baseline: positions and pooling are taken from them (RoBERTa's,
            # decoders'), and stay what they are on the way.
            with _replaced(embeddings, embeddings(baseline)):
                empty = logits(ids)
        # A decoder that knows no padding takes one row at a time.
        pads = getattr(unwrapped_base(model).config, "pad_token_id", None) is not None
        attributed = integrated_gradients(
            lambda ids: _log_odds(logits(ids), chosen), embeddings
        ).attribute(ids, baseline, n_steps=steps, internal_batch_size=None if pads else 1)
    scores = attributed.detach()[0].double().sum(-1)
    score, start = (float(_log_odds(each, chosen)) for each in (whole, empty))
    gap = abs(float(scores.sum()) - (score - start))
    if gap > LARGEST_ERROR * max(abs(score - start), 1e-2):
        logger.warning(
            "The attributions add up to %.3f, and the scores differ by %.3f: use more than %d "
            "steps.",
            float(scores.sum()),
            score - start,
            steps,
        )
    tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    return TokenAttributions(tokens, scores.tolist(), chosen, score, start, gap)


def compare_attributions(
    before: nn.Module,
    after: nn.Module,
    tokenizer: Any,
    text: str,
    target: int | None = None,
    steps: int = 32,
) -> AttributionChange:
    """The attributions of one text by two models: what adaptation has made of its words.

    Args:
        before: The model before adaptation.
        after: The model after it, with the same tokenizer and classes.
        tokenizer: The tokenizer of both.
        text: One text.
        target: The number of the class; that which `after` predicts by default.
        steps: Points at which the gradient is taken.

    Raises:
        ImportError: If captum is not installed.
        ValueError: As [`token_attributions`].

    Example:
        ```python
        print(compare_attributions(source_only, adapted, tokenizer, "A page-turner."))
        ```
    """
    new = token_attributions(after, tokenizer, text, target, steps)
    return AttributionChange(token_attributions(before, tokenizer, text, new.target, steps), new)


def _integrated_gradients() -> Any:
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError as error:
        raise ImportError(
            "token_attributions needs the package captum. Install it with "
            '`pip install "hf-adapt[attributions]"`.'
        ) from error
    return LayerIntegratedGradients


def _encoded(
    tokenizer: Any, text: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The tokens of a text, (1, T); which of them the tokenizer added; and the other inputs."""
    inputs = tokenizer(text, return_tensors="pt", truncation=True, return_special_tokens_mask=True)
    inputs = dict(inputs.to(device))
    added = inputs.pop("special_tokens_mask").bool()
    if bool(added.all()):
        raise ValueError(f"Expected a text with tokens, got {text!r}.")
    return inputs.pop("input_ids"), added, inputs


def _checked(logits: Any, model: nn.Module) -> torch.Tensor:
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"Expected a model that gives a text scores of at least two classes, (1, C); "
            f"{type(unwrapped_base(model)).__name__} gave {tuple(logits.shape)}."
        )
    return logits.float()


def _input_embeddings(model: nn.Module) -> nn.Module:
    getter = getattr(unwrapped_base(model), "get_input_embeddings", None)
    if not callable(getter) or not isinstance(found := getter(), nn.Module):
        raise ValueError(
            f"Expected a transformers model of text, got {type(model).__name__}, which has no "
            "get_input_embeddings()."
        )
    return found


def _baseline_id(tokenizer: Any, embeddings: nn.Module, like: torch.Tensor) -> int:
    """The token that says nothing: padding, else a mask, an unknown word or the end of a text.

    An embedding of zeros comes last: a norm of it has no direction, and the gradients on the way to
    it miss the jump there (LLaMA).
    """
    kinds = ("pad", "mask", "unk", "eos")
    known = [getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds]
    numbers = [int(number) for number in known if number is not None]
    if not numbers:
        raise ValueError(
            "Expected a tokenizer with a padding token for the baseline; it has no padding, mask, "
            "unknown or end token. Set tokenizer.pad_token."
        )
    with torch.no_grad():
        return next((n for n in numbers if embeddings(like.new_tensor([[n]])).any()), numbers[0])


def _log_odds(logits: torch.Tensor, target: int) -> torch.Tensor:
    others = torch.arange(logits.shape[1], device=logits.device) != target
    return logits[:, target] - logits[:, others].logsumexp(1)


@contextmanager
def _replaced(module: nn.Module, output: torch.Tensor) -> Any:
    """The module gives this instead while the context is open."""
    handle = module.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()
