"""KnowledgeInjector: where and how knowledge enters a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from hf_adapt.knowledge.injection.injection_layers import (
    CrossAttention,
    GatedAddition,
    InjectionLayer,
    KnowledgeAdapter,
    LayerSizes,
    Record,
    size_of,
)
from hf_adapt.knowledge.injection.injection_points import Kind, Location
from hf_adapt.knowledge.injection.inputs import Knowledge
from hf_adapt.knowledge.injection.soft_prompt import NUM_PROMPT_TOKENS, SoftPrompt

Tokens = Literal["auto", "mention", "after"]

INJECTION_LAYERS: dict[str, type[InjectionLayer]] = {
    "gated": GatedAddition,
    "cross_attention": CrossAttention,
    "adapter": KnowledgeAdapter,
    "soft_prompt": SoftPrompt,
}
"""The injection layers by name; a subclass of one's own does as well."""

SMALLEST = 1e-12
"""A hidden state of zeros, as embeddings of padding are, is divided by this."""


@dataclass(frozen=True)
class InjectorSizes:
    """The sizes that a first forward, the graph and the vectors decide."""

    hidden_sizes: list[int]
    entity_size: int
    num_relations: int
    is_causal: bool


class KnowledgeInjector(nn.Module):
    """Adds what a graph knows of the entities in a text to a model's hidden states.

    It stands outside the model: the model's `state_dict` and checkpoint stay as they are. With the
    injection layers gated, cross_attention and adapter it is an exact no-op at first, since their
    output projections are zero, and always for rows without a mention. Soft prompts change the
    input, and so the model's output, from the first step on.

    Hidden states are read, and added to, in units of their own size (root mean square), which
    differs tenfold and more between embeddings and layers: one learning rate suits all points.

    Args:
        layers: Where: `"embeddings"`, layers' numbers (negative from the top), `"head"`, modules'
            dotted names, or a list of these. In an encoder–decoder they are the encoder's.
        injection_layer: How: `"gated"` ([`GatedAddition`]), `"cross_attention"`
            ([`CrossAttention`]), `"adapter"` ([`KnowledgeAdapter`]), `"soft_prompt"`
            ([`SoftPrompt`], for decoders), or a subclass of [`InjectionLayer`].
        num_neighbours: Neighbours in the graph that are read for each candidate: averaged into its
            vector by one step of message passing, or attended to one by one.
        inner_size: Size between the entities' vectors and the hidden states; by default the
            smaller of hidden size and 128.
        tokens: Which tokens of a mention are changed: `"mention"`, all of them; `"after"`, the one
            that follows it; `"auto"`, `"after"` in causal language models, else `"mention"`. That
            a mention ends here tells of the tokens up to the next one, so a language model that
            is to predict them may know of it only then.
        **options: For the injection layer, such as `num_heads`.

    Raises:
        ValueError: If an option is unknown or out of range.

    Example:
        >>> injector = KnowledgeInjector([3, -1], "cross_attention", num_neighbours=4)
        >>> injector.layers
        [3, -1]
    """

    def __init__(
        self,
        layers: Location | Sequence[Location] = "embeddings",
        injection_layer: str | type[InjectionLayer] = "gated",
        *,
        num_neighbours: int = 0,
        inner_size: int | None = None,
        tokens: Tokens = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        self.layers: list[Location] = [layers] if isinstance(layers, (int, str)) else list(layers)
        if not self.layers:
            raise ValueError("layers is empty: name at least one, such as 'embeddings'.")
        if isinstance(injection_layer, str) and injection_layer not in INJECTION_LAYERS:
            raise ValueError(
                f"injection_layer={injection_layer!r} is unknown: use "
                f"{', '.join(map(repr, INJECTION_LAYERS))}, or a subclass of "
                "hf_adapt.knowledge.InjectionLayer."
            )
        if num_neighbours < 0:
            raise ValueError(f"num_neighbours={num_neighbours} must be 0 or more.")
        if tokens not in get_args(Tokens):
            raise ValueError(f"tokens={tokens!r} is unknown: use 'auto', 'mention' or 'after'.")
        given = injection_layer
        self.layer_class = INJECTION_LAYERS[given] if isinstance(given, str) else given
        if self.layer_class.changes_input and self.layers != ["embeddings"]:
            raise ValueError(
                f"{self.layer_class.__name__} changes the input: layers must be 'embeddings', got "
                f"{self.layers}."
            )
        self.num_neighbours, self.inner_size = num_neighbours, inner_size
        self.tokens, self.options = tokens, options
        self.injection_layers = nn.ModuleList()
        self.sizes: InjectorSizes | None = None

    @property
    def is_built(self) -> bool:
        """Whether the sizes are known and the weights are there."""
        return self.sizes is not None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that stand before each row for it."""
        if not self.layer_class.changes_input:
            return 0
        return int(self.options.get("num_tokens", NUM_PROMPT_TOKENS))

    def build(self, sizes: InjectorSizes) -> None:
        """Make the weights."""
        relations = 2 * sizes.num_relations if self.num_neighbours else 0
        made = []
        for size in sizes.hidden_sizes:
            inner = self.inner_size or min(size, 128)
            own = LayerSizes(size, sizes.entity_size, inner, relations, sizes.is_causal)
            try:
                made.append(self.layer_class(own, **self.options))
            except TypeError as error:
                raise ValueError(
                    f"{self.layer_class.__name__} does not take {self.options}: {error}."
                ) from error
        self.injection_layers, self.sizes = nn.ModuleList(made), sizes

    def inject(
        self,
        number: int,
        kind: Kind,
        hidden: torch.Tensor,
        knowledge: Knowledge,
        record: Record | None = None,
    ) -> torch.Tensor:
        """Hidden states, (B, T, H) or (B, H) for a head over rows, with knowledge added.

        It is computed in the injector's own precision, with autocast off.
        """
        layer = self.injection_layers[number]
        assert isinstance(layer, InjectionLayer)
        with torch.autocast(hidden.device.type, enabled=False):
            own = hidden.to(layer.output.weight.dtype)
            size = size_of(own) if layer.is_relative else own.new_ones(())
            own = own / size.clamp(min=SMALLEST)
            if kind != "row_head":
                added = layer(own, knowledge, record)
            elif hidden.ndim == 2:
                added = layer.row_values(own, knowledge, record)
            else:
                mean = _row_mean(own, knowledge.mask)
                added = layer.row_values(mean, knowledge, record).unsqueeze(1)
            changed: torch.Tensor = hidden + (added * size).to(hidden.dtype)
        return changed

    @property
    def settings(self) -> dict[str, Any]:
        """The options and sizes, as plain values: see [`from_settings`]."""
        names = [name for name, layer in INJECTION_LAYERS.items() if layer is self.layer_class]
        own = f"{self.layer_class.__module__}:{self.layer_class.__qualname__}"
        return {
            "layers": list(self.layers),
            "injection_layer": names[0] if names else own,
            "num_neighbours": self.num_neighbours,
            "inner_size": self.inner_size,
            "tokens": self.tokens,
            "options": self.options,
            "sizes": None if self.sizes is None else asdict(self.sizes),
        }

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], injection_layer: type[InjectionLayer] | None = None
    ) -> KnowledgeInjector:
        """The injector that `settings` describes, with new weights.

        Raises:
            ValueError: If the injection layer is one of the user's own and is not given.
        """
        settings = dict(settings)
        sizes, options = settings.pop("sizes"), settings.pop("options")
        if injection_layer is None and settings["injection_layer"] not in INJECTION_LAYERS:
            raise ValueError(
                "The injector was made with an injection layer of your own, "
                f"{settings['injection_layer']}: pass the class as injection_layer=."
            )
        settings["injection_layer"] = injection_layer or settings["injection_layer"]
        injector = cls(**settings, **options)
        if sizes is not None:
            injector.build(InjectorSizes(**sizes))
        return injector


def _row_mean(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over a row's real tokens, (B, T, H) to (B, H), whatever its padding."""
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    real = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * real).sum(1) / real.sum(1).clamp(min=1)
