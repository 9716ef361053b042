"""Entity vectors from a model's own encoding of the entities' descriptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.models.capture import hidden_state
from hf_adapt.models.pooling import Pooling, pool, token_mask
from hf_adapt.models.state import preserved
from hf_adapt.models.structure import find_feature_module, is_encoder_decoder, unwrapped_base


def encode_descriptions(
    graph: KnowledgeGraph,
    model: nn.Module,
    tokenizer: Any,
    *,
    batch_size: int = 64,
    max_length: int = 64,
    pooling: Pooling = "mean",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Encode each entity as the model's hidden state of "label: description", pooled.

    The vectors know no triples, but they lie in the model's own space and need no training. Of an
    entity without a description, the label alone is encoded.

    Args:
        graph: Whose entities they are.
        model: Any transformers model; its head is not run. Its device, training mode, buffers and
            the random state are left as they were.
        tokenizer: The model's own; it needs no padding token.
        batch_size: Number of texts at a time.
        max_length: Number of tokens at most; the rest of a description is cut off.
        pooling: How one vector is made of the tokens, as the engine's `pool` does it.
        device: Where to compute; where the model is if it is None.
        progress: Whether to show a progress bar.

    Returns:
        The vectors and how they were made.

    Shape:
        - output: (entities, hidden size), float32.
    """
    every = range(len(graph))
    described = ((graph.label(entity), graph.description(entity)) for entity in every)
    texts = [f"{label}: {text}" if text else label for label, text in described]
    order = np.argsort([-len(text) for text in texts], kind="stable")  # little padding
    table = np.zeros((0, 0), np.float32)
    pad = tokenizer.pad_token_id or 0
    bar = tqdm(total=len(texts), desc="Encoding descriptions", disable=not progress)
    with _evaluating(model, device) as place, bar:
        module = _reader(model)
        for first in range(0, len(texts), batch_size):
            rows = order[first : first + batch_size]
            ids = tokenizer([texts[row] for row in rows], truncation=True, max_length=max_length)[
                "input_ids"
            ]
            hidden, mask = _hidden(module, model, ids, pad, place)
            pooled = pool(hidden, mask, "mean" if pooling == "auto" else pooling)
            if not len(table):
                table = np.zeros((len(texts), pooled.shape[-1]), np.float32)
            if pooled.ndim != 2 or len(pooled) != len(rows):
                raise ValueError(
                    f"pooling={pooling!r} made {tuple(pooled.shape)} of {len(rows)} texts; "
                    "expected one vector for each: use 'mean', 'cls' or 'last'."
                )
            table[rows] = pooled.cpu().numpy()
            bar.update(len(rows))
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return table, {
        "made_by": "descriptions",
        "model": name or type(model).__name__,
        "max_length": max_length,
        "pooling": pooling if isinstance(pooling, str) else "callable",
    }


def _reader(model: nn.Module) -> nn.Module:
    """What reads texts: the model without its head."""
    base = unwrapped_base(model)
    if getattr(base, "base_model", None) is base and not is_encoder_decoder(base):
        return cast(nn.Module, base)  # it has none
    return find_feature_module(model, None)


def _hidden(
    module: nn.Module, model: nn.Module, ids: list[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state of padded texts, and which positions are real."""
    # On the right, whatever the tokenizer prefers: then positions need no correction.
    width = max(1, max(len(row) for row in ids))
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    hidden = hidden_state(module(input_ids=padded, attention_mask=mask))
    if hidden is None:
        raise ValueError(
            f"{type(module).__name__} gives no hidden state. Pass a transformers model that reads "
            "input_ids, or make the vectors yourself: EntityVectors.from_array(array, graph)."
        )
    return hidden, token_mask(hidden, mask, model)


@contextmanager
def _evaluating(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """The model in evaluation mode without gradients, on a device; afterwards it is as it was."""
    home = next(model.parameters()).device
    place = home if device is None else torch.device(device)
    with preserved(model), torch.no_grad():
        model.eval()
        try:
            if place != home:
                model.to(place)
            yield place
        finally:
            if place != home:
                model.to(home)
