"""Knowledge injectors for tiny models, random mentions, and Trainers with them."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_adapt import adapt
from hf_adapt.knowledge import KnowledgeInjection, KnowledgeInjector
from hf_adapt.knowledge.injection.injector import InjectorSizes
from hf_adapt.knowledge.injection.inputs import Knowledge
from tests.helpers import toy
from tests.helpers.models import CAUSAL, ROWS, VOCABULARY, family
from tests.helpers.trainers import arguments

DIMENSION, RELATIONS = 6, 3


def inputs(name: str, rows: int = 3, length: int = 10, seed: int = 1) -> dict[str, torch.Tensor]:
    """Rows of tokens with labels; the last row is shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, length - 2 :], mask[-1, length - 2 :] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    if name in ROWS:
        labels = torch.arange(rows) % 2
    if name == "bert_tokens":
        labels = (ids % 2).masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "bert_answers":
        first = torch.arange(rows) + 1
        return {**batch, "start_positions": first, "end_positions": first + 1}
    return {**batch, "labels": labels}


def knowledge(
    rows: int = 3, seed: int = 2, neighbours: int = 2, mentions: bool = True
) -> dict[str, torch.Tensor]:
    """Mentions in every row but the second: tokens 1 to 3, and 5."""
    generator = torch.Generator().manual_seed(seed)
    spans = torch.tensor([[1, 3], [5, 6]]).repeat(rows, 1, 1)
    entities = torch.randint(0, 9, (rows, 2, 3), generator=generator)
    entities[:, 1, 2] = -1
    priors = torch.rand(rows, 2, 3, generator=generator)
    vectors = torch.randn(rows, 2, 3, DIMENSION, generator=generator)
    near = torch.randn(rows, 2, 3, neighbours, DIMENSION, generator=generator)
    relations = torch.randint(0, 2 * RELATIONS, (rows, 2, 3, neighbours), generator=generator)
    relations[..., -1] = -1
    absent = torch.zeros(rows, dtype=torch.bool)
    absent[1] = True
    if not mentions:
        absent[:] = True
    spans[absent], entities[absent] = 0, -1
    there = entities >= 0
    priors = priors * there
    priors = priors / priors.sum(-1, keepdim=True).clamp(min=1e-9)
    return Knowledge(
        spans,
        entities,
        priors,
        vectors * there.unsqueeze(-1),
        near * there[..., None, None],
        relations.masked_fill(~there.unsqueeze(-1), -1),
    ).inputs()


def built(
    name: str,
    layers: Any = ("embeddings", 0),
    injection_layer: str = "gated",
    seed: int = 3,
    **options: Any,
) -> KnowledgeInjector:
    """An injector for a tiny model, with its weights made."""
    torch.manual_seed(seed)
    injector = KnowledgeInjector(list(layers), injection_layer, inner_size=8, **options)
    injector.build(InjectorSizes([16] * len(layers), DIMENSION, RELATIONS, name in CAUSAL))
    return injector


def disturb(injector: KnowledgeInjector, seed: int = 4, scale: float = 0.5) -> None:
    """Make the output projections do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in injector.injection_layers:
            layer.output.weight.copy_(
                scale * torch.randn(layer.output.weight.shape, generator=generator)
            )


LABELS = {
    **dict.fromkeys(("gpt2", "llama", "lora_llama", "t5", "bart"), "lm"),
    "bert_tokens": "token",
    "bert_masked": "masked",
    "bert_answers": "answer",
}


def injection(**options: Any) -> KnowledgeInjection:
    """The toy graph and its vectors at the embeddings and the first layer."""
    defaults: dict[str, Any] = dict(
        vectors=toy.vectors(),
        injector=KnowledgeInjector(["embeddings", 0], num_neighbours=2, inner_size=8),
        learning_rate=1e-2,
    )
    return KnowledgeInjection(toy.graph(), **{**defaults, **options})


def trainer(
    folder: Path,
    name: str = "bert",
    cls: type[Trainer] = Trainer,
    data: Any = None,
    **settings: Any,
) -> Trainer:
    """A Trainer of a family on the toy graph's sentences."""
    labels = LABELS.get(name, "row")
    return cls(
        family(name),
        arguments(folder, **settings),
        train_dataset=toy.rows(24, 1, labels) if data is None else data,
        eval_dataset=toy.rows(6, 2, labels),
        data_collator=toy.collator(labels),
        processing_class=toy.tokenizer(),
    )


def trained(folder: Path, name: str = "bert", save_graph: bool = True, **options: Any) -> Trainer:
    """A run of four steps, saved in the folder's `final`."""
    defaults: dict[str, Any] = dict(
        vectors=toy.vectors(), injector=KnowledgeInjector(["embeddings", 0], num_neighbours=2)
    )
    own = KnowledgeInjection(
        toy.graph(), **{**defaults, **options}, save_graph=save_graph, learning_rate=3e-2
    )
    one = trainer(folder, name, max_steps=4, save_strategy="steps", save_steps=4)
    adapt(one, own).train()
    one.save_model(str(folder / "final"))
    one.model.eval()
    return one
