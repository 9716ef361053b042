"""KnowledgeInjector: where and how knowledge enters a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from hf_adapt.knowledge.injection.forms import (
    CrossAttention,
    Form,
    GatedAddition,
    KnowledgeAdapter,
    Record,
    size_of,
)
from hf_adapt.knowledge.injection.inputs import Knowledge
from hf_adapt.knowledge.injection.prompts import SoftPrompt
from hf_adapt.knowledge.injection.sites import Kind, Place
from hf_adapt.knowledge.injection.text_triples import TextTriples

Tokens = Literal["auto", "mention", "after"]

FORMS: dict[str, type[Form] | type[TextTriples]] = {
    "gated": GatedAddition,
    "cross_attention": CrossAttention,
    "adapter": KnowledgeAdapter,
    "soft_prompt": SoftPrompt,
    "text_triples": TextTriples,
}
"""The forms by name; a subclass of one's own does as well."""

SMALLEST = 1e-12
"""A hidden state of zeros, as embeddings of padding are, is divided by this."""


class KnowledgeInjector(nn.Module):
    """Adds what a graph knows of the entities in a text to a model's hidden states.

    It stands outside the model: the model's `state_dict` and checkpoint stay as they are. With the
    forms gated, cross_attention and adapter it is an exact no-op at first, since their output
    projections are zero, and always for rows without a mention. Soft prompts and text triples
    change the input, and so the answers, from the first step on.

    Hidden states are read, and added to, in units of their own size (root mean square), which
    differs tenfold and more between embeddings and layers: one learning rate does for all places.

    Args:
        layers: Where: `"embeddings"`, layers' numbers (negative from the top), `"head"`, modules'
            dotted names, or a list of these. In an encoder–decoder they are the encoder's.
        form: How: `"gated"` ([`GatedAddition`]), `"cross_attention"` ([`CrossAttention`]: to the
            mention's candidates, their neighbours and a "no knowledge" sentinel), `"adapter"`
            ([`KnowledgeAdapter`]), `"soft_prompt"` ([`SoftPrompt`], for decoders),
            `"text_triples"` ([`TextTriples`], for encoders), or a subclass of [`Form`].
        num_neighbours: Neighbours in the graph that are looked at for each candidate: averaged
            into its vector by one step of message passing, or attended to one by one.
        inner_size: Size between the entities' vectors and the hidden states; by default the
            smaller of hidden size and 128.
        tokens: Which tokens of a mention are changed: `"mention"`, all of them; `"after"`, the one
            that follows it; `"auto"`, `"after"` in causal language models, else `"mention"`. That
            a mention ends here tells of the tokens up to the next one, so a language model that
            is to predict them may know of it only then.
        **options: For the form, such as `num_heads`.

    Raises:
        ValueError: If an option is unknown or out of range.

    Example:
        >>> injector = KnowledgeInjector(layers=[3, -1], form="cross_attention", num_neighbours=4)
        >>> injector.places
        [3, -1]
    """

    def __init__(
        self,
        layers: Place | Sequence[Place] = "embeddings",
        form: str | type[Form] = "gated",
        *,
        num_neighbours: int = 0,
        inner_size: int | None = None,
        tokens: Tokens = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        self.places: list[Place] = [layers] if isinstance(layers, (int, str)) else list(layers)
        if not self.places:
            raise ValueError("layers is empty: name at least one place, such as 'embeddings'.")
        if isinstance(form, str) and form not in FORMS:
            raise ValueError(
                f"form={form!r} is unknown: use {', '.join(map(repr, FORMS))}, or a subclass of "
                "hf_adapt.knowledge.Form."
            )
        if num_neighbours < 0:
            raise ValueError(f"num_neighbours={num_neighbours} must be 0 or more.")
        if tokens not in get_args(Tokens):
            raise ValueError(f"tokens={tokens!r} is unknown: use 'auto', 'mention' or 'after'.")
        self.form = FORMS[form] if isinstance(form, str) else form
        if self.form.changes != "hidden" and self.places != ["embeddings"]:
            raise ValueError(
                f"{self.form.__name__} changes the input: layers must be 'embeddings', got "
                f"{self.places}."
            )
        self.text = TextTriples(**options) if issubclass(self.form, TextTriples) else None
        self.num_neighbours = num_neighbours
        self.inner_size = inner_size
        self.tokens = tokens
        self.options = options
        self.forms = nn.ModuleList()
        self.sizes: dict[str, Any] | None = None

    @property
    def is_built(self) -> bool:
        """Whether the sizes are known and the weights are there."""
        return self.sizes is not None

    @property
    def needs_vectors(self) -> bool:
        """Whether it reads entity vectors (else the facts' text)."""
        return self.text is None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that stand before each row for it."""
        if self.form.changes != "prompt":
            return 0
        default = inspect.signature(self.form).parameters["num_tokens"].default
        return int(self.options.get("num_tokens", default))

    def build(
        self, hidden_sizes: Sequence[int], dimension: int, num_relations: int, is_causal: bool
    ) -> None:
        """Make the weights.

        Args:
            hidden_sizes: Of the places, in order.
            dimension: Of the entities' vectors.
            num_relations: Of the graph, inverses not counted.
            is_causal: Whether the model is a causal language model.
        """
        sizes = {
            "hidden_sizes": list(hidden_sizes),
            "dimension": dimension,
            "num_relations": num_relations,
            "is_causal": is_causal,
        }
        relations = 2 * num_relations if self.num_neighbours else 0
        if issubclass(self.form, TextTriples):
            self.sizes = sizes
            return
        made = []
        for size in hidden_sizes:
            inner = self.inner_size or min(size, 128)
            try:
                made.append(self.form(size, dimension, inner, relations, is_causal, **self.options))
            except TypeError as error:
                raise ValueError(
                    f"{self.form.__name__} does not take {self.options}: {error}."
                ) from error
        self.forms, self.sizes = nn.ModuleList(made), sizes

    def change(
        self,
        number: int,
        kind: Kind,
        hidden: torch.Tensor,
        knowledge: Knowledge,
        record: Record | None = None,
    ) -> torch.Tensor:
        """Hidden states with knowledge added, in their own dtype.

        It is computed in the injector's own precision, with autocast off.

        Args:
            number: Which of the places.
            kind: What kind of place.
            hidden: (B, T, H), or (B, H) for a head over rows.
            knowledge: The mentions of these rows.
            record: Where to put what `explain` shows, or None.
        """
        form = self.forms[number]
        assert isinstance(form, Form)
        with torch.autocast(hidden.device.type, enabled=False):
            own = hidden.to(form.output.weight.dtype)
            size = size_of(own) if form.is_relative else own.new_ones(())
            own = own / size.clamp(min=SMALLEST)
            if kind != "row_head":
                added = form(own, knowledge, record)
            elif hidden.ndim == 2:
                added = form.row_values(own, knowledge, record)
            else:
                mean = _row_mean(own, knowledge.mask)
                added = form.row_values(mean, knowledge, record).unsqueeze(1)
            changed: torch.Tensor = hidden + (added * size).to(hidden.dtype)
        return changed

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the same injector again, as plain values."""
        names = [name for name, form in FORMS.items() if form is self.form]
        return {
            "layers": list(self.places),
            "form": names[0] if names else f"{self.form.__module__}:{self.form.__qualname__}",
            "num_neighbours": self.num_neighbours,
            "inner_size": self.inner_size,
            "tokens": self.tokens,
            "options": self.options,
            "sizes": self.sizes,
        }

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], form: type[Form] | None = None
    ) -> KnowledgeInjector:
        """The injector that `settings` describes, with new weights.

        Args:
            settings: What the property of this name gave.
            form: The class, where the form is one of the user's own.

        Raises:
            ValueError: If the form is one of the user's own and is not given.
        """
        settings = dict(settings)
        sizes, options = settings.pop("sizes"), settings.pop("options")
        if form is None and settings["form"] not in FORMS:
            raise ValueError(
                f"The injector was made with a form of your own, {settings['form']}: pass the "
                "class as form=."
            )
        settings["form"] = form or settings["form"]
        injector = cls(**settings, **options)
        if sizes is not None:
            injector.build(**sizes)
        return injector


def _row_mean(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over a row's real tokens, (B, T, H) to (B, H), whatever its padding."""
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    real = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * real).sum(1) / real.sum(1).clamp(min=1)
