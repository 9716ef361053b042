"""A graph of networkx as the arrays of a knowledge graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from hf_adapt.knowledge.graphs.builder import build, pairs_of
from hf_adapt.knowledge.graphs.content import Content
from hf_adapt.knowledge.graphs.triples import is_missing, read_triples


def read(graph: Any, relation: str, name: str, description: str) -> Content:
    """Read the arrays of a networkx graph; see [`KnowledgeGraph.from_networkx`]."""
    if not hasattr(graph, "nodes") or not hasattr(graph, "edges"):
        raise TypeError(f"Expected a networkx graph, got a {type(graph).__name__}.")
    keys: dict[str, Any] = {}
    for node in graph.nodes:
        if is_missing(node):
            raise ValueError(
                f"The networkx graph has the missing value {node!r} as a node, with edges to "
                f"{list(graph.adj[node])[:5]!r}. Remove the node: graph.remove_node({node!r})."
            )
        if (other := keys.setdefault(str(node), node)) is not node:
            raise ValueError(
                f"The nodes {other!r} and {node!r} would have one key, {str(node)!r}. Give them "
                "different texts: networkx.relabel_nodes(graph, {…})."
            )

    def texts(attribute: str) -> dict[str, Any]:
        found = ((str(node), data.get(attribute, "")) for node, data in graph.nodes(data=True))
        return {key: value for key, value in found if not isinstance(value, str) or value}

    return build(
        read_triples(_triples(graph, relation), ("head", "relation", "tail")),
        pairs_of(texts(name), "name", given_as=f"The node attribute {name!r}"),
        pairs_of(texts(description), "description", given_as=f"The node attribute {description!r}"),
        isolated=pa.array(keys, pa.large_string()),
        source="The networkx graph",
    )


def _triples(graph: Any, relation: str) -> Iterator[tuple[str, Any, str]]:
    options = {"keys": True} if graph.is_multigraph() else {}
    for head, tail, *key, data in graph.edges(data=True, **options):
        default = key[0] if key and isinstance(key[0], str) else "related_to"
        if is_missing(kind := data.get(relation, default)):
            raise ValueError(
                f"The edge from {head!r} to {tail!r} has {relation}={kind!r}. Give it a relation, "
                "or delete the attribute: then it is 'related_to'."
            )
        yield str(head), kind, str(tail)
