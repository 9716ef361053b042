"""A graph of networkx as the arrays of a knowledge graph."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from hf_adapt.knowledge.graphs.building import build, pairs_of
from hf_adapt.knowledge.graphs.content import Content
from hf_adapt.knowledge.graphs.triples import read_triples


def read(graph: Any, relation: str, name: str, description: str) -> Content:
    """The arrays of a networkx graph; see [`KnowledgeGraph.from_networkx`]."""
    if not hasattr(graph, "nodes") or not hasattr(graph, "edges"):
        raise TypeError(f"Expected a networkx graph, got a {type(graph).__name__}.")
    keys: dict[str, Any] = {}
    for node in graph.nodes:
        if (other := keys.setdefault(str(node), node)) is not node:
            raise ValueError(
                f"The nodes {other!r} and {node!r} would have one key, {str(node)!r}. Give them "
                "different texts: networkx.relabel_nodes(graph, {…})."
            )
    if graph.is_multigraph():
        edges = (
            (str(u), data.get(relation, key if isinstance(key, str) else "related_to"), str(v))
            for u, v, key, data in graph.edges(keys=True, data=True)
        )
    else:
        edges = (
            (str(u), data.get(relation, "related_to"), str(v))
            for u, v, data in graph.edges(data=True)
        )
    nodes = list(graph.nodes(data=True))
    names = {str(node): data[name] for node, data in nodes if data.get(name)}
    texts = {str(node): data[description] for node, data in nodes if data.get(description)}
    return build(
        read_triples(edges, ("head", "relation", "tail")),
        pairs_of(names, "name"),
        pairs_of(texts, "description"),
        isolated=pa.array(keys, pa.large_string()),
        source="The networkx graph",
    )
