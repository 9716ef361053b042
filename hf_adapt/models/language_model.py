"""Language models that belong to a model without a language-model head, and their heads alone."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from hf_adapt.models.heads import HEADS, HeadName, has_head, is_causal_lm
from hf_adapt.models.structure import is_encoder_decoder, unwrapped_base

logger = logging.getLogger(__name__)

NEW_HEAD_RATE = 3e-3
"""Learning rate of a new head: at 1e-3 it needs about twice as many steps."""


def language_model_kind(model: nn.Module) -> HeadName:
    """Which language model a model is, or would be with another head.

    Returns:
        `"masked_lm"` or `"causal_lm"`.

    Raises:
        ValueError: If it is an encoder-decoder, or of a type without language models.
    """
    base = unwrapped_base(model)
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if is_encoder_decoder(base):
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder, whose language modelling (span "
            "corruption) is not supported. Use an objective on features (MMD, DANN), or an encoder."
        )
    if is_causal_lm(base):
        return "causal_lm"
    if has_head(base, "masked_lm") or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked_lm"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal_lm"
    raise ValueError(
        f"{type(base).__name__} (model_type {kind!r}) has no language model in transformers: "
        "language modelling needs an encoder or decoder of text. Use an objective on features "
        "(MMD, DANN)."
    )


def load_language_model(model: nn.Module) -> PreTrainedModel | None:
    """The language model of the checkpoint that a model was loaded from, with its trained head.

    Returns:
        The language model; None where the checkpoint is not known or has no trained head.
    """
    base = unwrapped_base(model)
    name = getattr(base, "name_or_path", None)
    if not name:
        return None
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        loaded, found = _auto_class(base).from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        logger.info("No language model can be loaded from %s: %s", name, error)
        return None
    finally:
        transformers.logging.set_verbosity(verbosity)
    body = f"{loaded.base_model_prefix}."
    if any(not key.startswith(body) for key in found["missing_keys"]):
        return None
    return cast(PreTrainedModel, loaded)


def language_model_of(model: nn.Module) -> tuple[PreTrainedModel, bool]:
    """A language model that shares the model's encoder or decoder: to train the one trains both.

    Returns:
        The language model (the model itself where it is one), and whether its head is new.
    """
    base = unwrapped_base(model)
    kind = language_model_kind(base)
    assert isinstance(base, PreTrainedModel)
    if has_head(base, kind):
        return base, False
    found = load_language_model(base)
    language_model: Any = found
    if language_model is None:
        language_model = _auto_class(base).from_config(copy.deepcopy(base.config))
    body = base.base_model
    setattr(language_model, language_model.base_model_prefix, body)
    language_model.to(body.device).to(body.dtype)
    language_model.tie_weights()
    shared = {id(parameter) for parameter in body.parameters()}
    has_own = any(id(parameter) not in shared for parameter in language_model.parameters())
    return language_model, found is None and has_own


def _auto_class(base: nn.Module) -> Any:
    return getattr(transformers, HEADS[language_model_kind(base)].auto_class)


class LanguageModelHead(nn.Module):
    r"""Scores of the vocabulary from hidden states, by the model's own input embeddings E.

    .. math::
        z = E \, \mathrm{norm}(a(W h + c)) + b

    The embeddings are an argument: they are neither parameters of the head nor saved with it.

    Args:
        hidden_size: Size of the hidden states.
        embedding_size: Size of the embeddings.
        vocabulary_size: Number of embeddings.

    Shape:
        - hidden: (N, D), embeddings: (V, E); output: (N, V), in float32.

    Example:
        >>> LanguageModelHead(4, 4, 7)(torch.zeros(2, 4), torch.zeros(7, 4)).shape
        torch.Size([2, 7])
    """

    def __init__(self, hidden_size: int, embedding_size: int, vocabulary_size: int) -> None:
        super().__init__()
        dense = nn.Linear(hidden_size, embedding_size)
        if hidden_size == embedding_size:
            # From the hidden state itself it learns about twice as fast as from a random matrix.
            nn.init.eye_(dense.weight)
            nn.init.zeros_(dense.bias)
        self.transform: nn.Module = nn.Sequential(dense, nn.LayerNorm(embedding_size))
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """The scores; see the class."""
        return F.linear(self.transform(hidden), embeddings.float(), self.bias)

    @classmethod
    @torch.no_grad()
    def of(cls, language_model: Any) -> LanguageModelHead | None:
        """The trained head of a masked language model: a dense layer, activation and norm.

        Returns:
            The head; None if it is not of this form.
        """
        prefix, output = language_model.base_model_prefix, language_model.get_output_embeddings()
        outside = [m for n, m in language_model.named_modules() if n.split(".")[0] != prefix]
        leaves = [m for m in outside if not list(m.children()) and m is not output]
        dense = [m for m in leaves if isinstance(m, nn.Linear)]
        norms = [m for m in leaves if "Norm" in type(m).__name__]
        plain = [m for m in leaves if not list(m.parameters()) and "Loss" not in type(m).__name__]
        if output is None or len(dense) != 1 or len(norms) != 1:
            return None
        weight = output.weight
        head = cls(1, 1, len(weight))
        activation = plain[0] if plain else nn.GELU()  # RoBERTa and others call a function
        head.transform = nn.Sequential(dense[0], activation, norms[0]).float()
        if getattr(output, "bias", None) is not None:
            head.bias.copy_(output.bias)
        tokens = torch.arange(1, 9).unsqueeze(0) % len(weight)
        language_model.float().eval()
        hidden = language_model.base_model(tokens)[0]
        own, expected = head(hidden[0], output.weight), language_model(tokens)[0][0]
        return head if torch.allclose(own, expected, rtol=1e-3, atol=1e-3) else None
