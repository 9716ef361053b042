"""Entity vectors learned from the graph's own triples, by PyKEEN."""

from __future__ import annotations

import gc
import importlib
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.graphs.triples import read_triples
from hf_adapt.models.state import preserved_random_state
from hf_adapt.storage.string_table import StringTable

MODELS = ("TransE", "DistMult", "ComplEx", "RotatE")
METRICS = {
    "mrr": "inverse_harmonic_mean_rank",
    "hits@1": "hits_at_1",
    "hits@3": "hits_at_3",
    "hits@10": "hits_at_10",
    "mean_rank": "arithmetic_mean_rank",
}


def train_vectors(
    graph: KnowledgeGraph,
    model: str = "TransE",
    *,
    dimension: int = 64,
    num_epochs: int = 60,
    learning_rate: float = 0.02,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    training_loop: Literal["lcwa", "slcwa"] = "lcwa",
    evaluation: Any = None,
    known: Any = None,
    progress: bool = True,
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Learn vectors that tell the graph's triples from other triples.

    Inverse triples are added and the optimizer is Adam. The random state is left as it was.

    Reference:
        Bordes et al. 2013 (TransE), "Translating Embeddings for Modeling Multi-relational Data";
        Yang et al. 2015 (DistMult), arXiv:1412.6575; Trouillon et al. 2016 (ComplEx),
        arXiv:1606.06357; Sun et al. 2019 (RotatE), arXiv:1902.10197; the implementation is that
        of Ali et al. 2021, "PyKEEN 1.0".

    Args:
        graph: To learn.
        model: `"TransE"`, `"DistMult"`, `"ComplEx"` or `"RotatE"`.
        dimension: Of a vector; the last two models have complex numbers, so theirs are stored in
            twice as many columns: the real parts, then the imaginary ones.
        num_epochs: Passes over the triples.
        learning_rate: Of Adam.
        batch_size: Of triples, or of (entity, relation) pairs with `"lcwa"`.
        seed: Of the initial vectors and of the order of batches.
        device: Where to compute; the first GPU, else the CPU, if it is None.
        training_loop: `"lcwa"` compares each pair with all entities, by cross-entropy: best up to
            some 50,000 entities. `"slcwa"` draws wrong triples, with self-adversarial negative
            sampling: for more.
        evaluation: Test triples by keys, as [`KnowledgeGraph.from_triples`] takes them, or a
            graph; `metadata["link_prediction"]` then has mrr, hits@1, hits@3, hits@10 and
            mean_rank: how well each end of a test triple is found from the other, among all
            entities but those that are right answers too.
        known: Further triples that are right answers (validation), so that they do not count
            against the test triples.
        progress: Whether to show a bar.

    Raises:
        ImportError: If PyKEEN is not installed.
        ValueError: If the model is unknown, or test triples have other entities or relations.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r}: expected one of {', '.join(map(repr, MODELS))}.")
    if training_loop not in ("lcwa", "slcwa"):
        raise ValueError(f"training_loop={training_loop!r}: expected 'lcwa' or 'slcwa'.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    test = None if evaluation is None else _numbers(graph, evaluation)
    filtered = [] if known is None else [_numbers(graph, known)]
    factory = _pykeen("triples").CoreTriplesFactory(
        torch.from_numpy(np.array(graph.triples, np.int64)),
        num_entities=len(graph),
        num_relations=graph.num_relations,
        create_inverse_triples=True,
    )
    with _own_random_state(seed):
        learned = _pykeen("models").model_resolver.make(
            model,
            triples_factory=factory,
            embedding_dim=dimension,
            loss="crossentropy" if training_loop == "lcwa" else "nssa",
            random_seed=seed,
        )
        learned = learned.to(place)
        loop = _pykeen("training").training_loop_resolver.make(
            training_loop,
            model=learned,
            triples_factory=factory,
            optimizer="Adam",
            optimizer_kwargs={"lr": learning_rate},
            automatic_memory_optimization=False,
        )
        with warnings.catch_warnings():
            # PyKEEN 1.11.1 gives its own data loader an option that it has deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            losses = loop.train(
                factory,
                num_epochs=num_epochs,
                batch_size=batch_size,
                use_tqdm=progress,
                use_tqdm_batch=False,
                pin_memory=place.type == "cuda",
            )
        right = [factory.mapped_triples, *filtered]
        measured = {} if test is None else {"link_prediction": _evaluate(learned, test, right)}
    table = learned.entity_representations[0]().detach()
    if table.is_complex():
        table = torch.cat([table.real, table.imag], dim=-1)
    options: dict[str, Any] = dict(dimension=dimension, num_epochs=num_epochs, seed=seed)
    options |= dict(learning_rate=learning_rate, batch_size=batch_size, training_loop=training_loop)
    metadata = {"made_by": model, **options, "loss": float(losses[-1]), **measured}
    return table.float().cpu().numpy(), metadata


def _pykeen(module: str) -> Any:
    try:
        return importlib.import_module(f"pykeen.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "pykeen":
            raise
        raise ImportError(
            'Training entity vectors needs PyKEEN: pip install "hf-adapt[embeddings]". Without '
            "it, use EntityVectors.from_descriptions(graph, model, tokenizer) or from_file."
        ) from error


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """PyKEEN draws from the global generators; the run's own go on as if it had not."""
    gc.freeze()  # PyKEEN collects after every epoch; what was there before need not be walked
    try:
        with preserved_random_state(seed):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        gc.unfreeze()


def _numbers(graph: KnowledgeGraph, triples: Any) -> torch.Tensor:
    """Triples by keys as the graph's numbers."""
    if isinstance(triples, KnowledgeGraph):
        other, rows = triples, triples.triples.tolist()
        triples = [(other.key(h), other.relations[r], other.key(t)) for h, r, t in rows]
    columns = read_triples(triples, ("head", "relation", "tail"))
    find = (graph.entities, StringTable.of(graph.relations).find_all, graph.entities)
    pairs = zip(find, columns, strict=True)
    found = [of(column.dictionary)[column.indices.to_numpy()] for of, column in pairs]
    numbers = np.stack(found, axis=1)
    if len(unknown := np.flatnonzero((numbers < 0).any(axis=1))):
        first = tuple(column[int(unknown[0])].as_py() for column in columns)
        raise ValueError(
            f"{len(unknown):,} of {len(numbers):,} triples to evaluate have an entity or a "
            f"relation that the graph does not, the first {first}: nothing was learned of them. "
            "Leave them out, or move triples of them to the graph."
        )
    return torch.from_numpy(numbers)


def _evaluate(model: Any, test: torch.Tensor, right: list[torch.Tensor]) -> dict[str, float]:
    evaluator = _pykeen("evaluation").RankBasedEvaluator(filtered=True)
    memory = logging.getLogger("torch_max_mem")  # warns on a CPU, where it has nothing to do
    level = memory.level
    memory.setLevel(logging.ERROR)
    try:
        results = evaluator.evaluate(
            model, test, additional_filter_triples=right, batch_size=32, use_tqdm=False
        )
    finally:
        memory.setLevel(level)
    get = results.get_metric
    return {name: float(get(f"both.realistic.{metric}")) for name, metric in METRICS.items()}
