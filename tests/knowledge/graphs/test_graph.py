"""The graph itself: content, neighbours, saving, fingerprints, memory."""

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_adapt.knowledge.graphs.builder import sort_triples
from hf_adapt.knowledge.graphs.content import Content
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph, UnknownEntityError
from tests.helpers.mapping import is_mapped

Triple = tuple[str, str, str]

ANIMALS: list[Triple] = [
    ("cat", "is_a", "feline"),
    ("lion", "is_a", "feline"),
    ("lion", "eats", "zebra"),
    ("feline", "is_a", "animal"),
    ("zebra", "is_a", "animal"),
    ("lion", "knows", "lion"),
]


def animals() -> KnowledgeGraph:
    return KnowledgeGraph.from_triples(
        ANIMALS,
        names={"cat": ["cat", "Felis catus", "猫"], "dodo": "dodo"},
        descriptions={"cat": "a small domesticated animal", "dodo": "extinct"},
    )


def test_numbers_names_and_descriptions() -> None:
    graph = animals()
    assert (len(graph), graph.num_entities, graph.num_relations, graph.num_triples) == (6, 6, 3, 6)
    assert [graph.key(i) for i in range(6)] == ["cat", "feline", "lion", "zebra", "animal", "dodo"]
    assert graph.relations == ["is_a", "eats", "knows"]
    assert [graph.entity(graph.key(i)) for i in range(6)] == list(range(6))
    assert graph.entities(["dodo", "cat", "phoenix"]).tolist() == [5, 0, -1]
    assert graph.names(0) == ["cat", "Felis catus", "猫"]
    assert (graph.label(0), graph.label(1), graph.names(1)) == ("cat", "feline", ["feline"])
    assert (graph.description(0), graph.description(1)) == ("a small domesticated animal", None)
    assert graph.neighbours(graph.entity("dodo")).entities.tolist() == []
    assert repr(graph) == "KnowledgeGraph(6 entities, 3 relations, 6 triples)"
    assert "is_a" in graph.describe()
    assert graph.statistics() == {
        "entities": 6,
        "relations": 3,
        "triples": 6,
        "names": 4,
        "described": 2,
        "isolated": 1,
        "mean_degree": 2.0,
        "max_degree": 4,
    }


def test_every_surface_is_given_once() -> None:
    assert list(animals().surfaces()) == [
        ("cat", 0, 1.0),
        ("Felis catus", 0, 1.0),
        ("猫", 0, 1.0),
        ("feline", 1, 1.0),
        ("lion", 2, 1.0),
        ("zebra", 3, 1.0),
        ("animal", 4, 1.0),
        ("dodo", 5, 1.0),
    ]


def test_surfaces_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(animals().surfaces())
    monkeypatch.setitem(Content.surfaces.__globals__, "CHUNK", 2)
    assert list(animals().surfaces()) == whole


def test_triples_are_sorted_each_once_and_read_only() -> None:
    graph = KnowledgeGraph.from_triples([*ANIMALS, *ANIMALS[::-1]])
    rows = [tuple(row) for row in graph.triples.tolist()]
    assert rows == sorted(set(rows)) and len(rows) == len(ANIMALS)
    assert graph.triples.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        graph.triples[0, 0] = 1


def test_triples_of_a_graph_too_large_for_one_number() -> None:
    rows = np.random.default_rng(0).integers(0, 4, (100, 3)).astype(np.int32)
    packed = sort_triples(*rows.T, 4, 4)
    assert np.array_equal(sort_triples(*rows.T, 2**31, 2**10), packed)
    assert np.array_equal(packed, np.unique(rows, axis=0))


def naive_neighbours(
    triples: list[Triple], graph: KnowledgeGraph, entity: int, relation: str | None, direction: str
) -> list[tuple[int, int]]:
    key = graph.key(entity)
    out = {
        (graph.relations.index(r), graph.entity(t))
        for h, r, t in triples
        if h == key and relation in (None, r)
    }
    into = {
        (graph.entity(h), graph.relations.index(r) + graph.num_relations)
        for h, r, t in triples
        if t == key and relation in (None, r)
    }
    found = sorted(out) * (direction != "in")
    return found + [(r, h) for h, r in sorted(into)] * (direction != "out")


words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=3)
few = st.sampled_from(["a", "b", "c", "日本", "é", "🙂"])
triples_of = st.lists(st.tuples(few | words, st.sampled_from(["r", "s"]), few), min_size=1)


@given(triples=triples_of, direction=st.sampled_from(["out", "in", "both"]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_neighbours_are_those_of_a_list(triples: list[Triple], direction: Any, data: Any) -> None:
    graph = KnowledgeGraph.from_triples(triples)
    relation = data.draw(st.none() | st.sampled_from(graph.relations))
    limit = data.draw(st.none() | st.integers(0, 4))
    for entity in range(len(graph)):
        expected = naive_neighbours(triples, graph, entity, relation, direction)[:limit]
        found = graph.neighbours(entity, relation, direction, limit)
        assert list(zip(*(part.tolist() for part in found), strict=True)) == expected
        assert found.relations.dtype == found.entities.dtype == np.int64


def test_an_inverse_asks_for_what_comes_in() -> None:
    graph = animals()
    is_a, feline = graph.relations.index("is_a"), graph.entity("feline")
    inverse = graph.neighbours(feline, is_a + graph.num_relations)
    assert [graph.key(int(e)) for e in inverse.entities] == ["cat", "lion"]
    assert set(inverse.relations.tolist()) == {is_a + graph.num_relations}


def test_what_is_not_there_is_said_with_what_is() -> None:
    graph = animals()
    with pytest.raises(KeyError, match="Near keys: 'feline'"):
        graph.entity("felin")
    with pytest.raises(UnknownEntityError, match="It is a name of 'cat'"):
        graph.entity("Felis catus")
    with pytest.raises(ValueError, match="No relation is called 'is'"):
        graph.neighbours(0, "is")
    with pytest.raises(ValueError, match="no relation 6: expected 0 to 2"):
        graph.neighbours(0, 6)
    with pytest.raises(ValueError, match="expected 'out', 'in' or 'both'"):
        graph.neighbours(0, direction="up")  # type: ignore[arg-type]
    for entity in (-1, 6):
        with pytest.raises(IndexError, match="expected 0 to 5"):
            graph.label(entity)


def test_near_keys_of_a_large_graph_are_found_by_their_beginning() -> None:
    graph = KnowledgeGraph.from_triples([(f"term:{i:07d}", "to", "root") for i in range(25_000)])
    with pytest.raises(KeyError, match="'term:0012345'"):
        graph.entity("term:0012345x")


@pytest.mark.parametrize(
    ("hops", "kept"),
    [(0, {"cat"}), (1, {"cat", "feline"}), (2, {"cat", "feline", "lion", "animal"})],
)
def test_subgraph_has_all_triples_among_its_entities(hops: int, kept: set[str]) -> None:
    graph = animals()
    part = graph.subgraph(["cat"], hops=hops)
    assert {part.key(i) for i in range(len(part))} == kept
    named = {(part.key(h), part.relations[r], part.key(t)) for h, r, t in part.triples.tolist()}
    assert named == {(h, r, t) for h, r, t in ANIMALS if {h, t} <= kept}
    cat = part.entity("cat")
    assert part.names(cat) == graph.names(0) and part.description(cat) == graph.description(0)
    assert part.relations == graph.relations


def test_subgraph_of_nothing() -> None:
    with pytest.raises(ValueError, match="got no entities"):
        animals().subgraph([])


def same(one: KnowledgeGraph, other: KnowledgeGraph) -> bool:
    return (
        np.array_equal(one.triples, other.triples)
        and one.relations == other.relations
        and [one.key(i) for i in range(len(one))] == [other.key(i) for i in range(len(other))]
        and [one.description(i) for i in range(len(one))]
        == [other.description(i) for i in range(len(other))]
        and list(one.surfaces()) == list(other.surfaces())
    )


@given(triples=triples_of, data=st.data())
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_saved_is_loaded(triples: list[Triple], data: Any, tmp_path: Path) -> None:
    texts = st.dictionaries(few | words, st.lists(words, min_size=1, max_size=3), max_size=4)
    names = data.draw(st.none() | texts)
    keys = st.sampled_from([row[0] for row in triples])
    descriptions = data.draw(st.none() | st.dictionaries(keys, words, max_size=3))
    graph = KnowledgeGraph.from_triples(triples, names=names, descriptions=descriptions)
    graph.save(tmp_path / "graph")
    loaded = KnowledgeGraph.load(tmp_path / "graph", verify=True)
    assert same(graph, loaded)
    assert graph.fingerprint == loaded.fingerprint
    assert is_mapped(loaded.triples, "triples.arrow")
    copy = pickle.loads(pickle.dumps(graph))
    assert same(graph, copy) and copy.fingerprint == graph.fingerprint


def test_saving_replaces_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first, second = animals(), KnowledgeGraph.from_triples([("a", "b", "c")])
    first.save(tmp_path)
    loaded = KnowledgeGraph.load(tmp_path)
    second.save(tmp_path)
    assert KnowledgeGraph.load(tmp_path, verify=True).fingerprint == second.fingerprint
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == [
        "config.json",
        "knowledge_graph",
        "knowledge_graph.json",
    ]
    assert same(loaded, first)  # what is mapped stays readable
    with pytest.raises(ValueError, match="holds another graph"):
        pickle.loads(pickle.dumps(loaded))
    again = KnowledgeGraph.load(tmp_path)
    again.save(tmp_path)
    assert KnowledgeGraph.load(tmp_path, verify=True).fingerprint == second.fingerprint


def test_a_failed_save_leaves_the_old_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    animals().save(tmp_path)
    from hf_adapt.storage import folder

    written = folder._write_array

    def fail(path: Path, array: Any) -> None:
        if path.name == "triples.arrow":
            raise OSError("disk full")
        written(path, array)

    monkeypatch.setattr(folder, "_write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        KnowledgeGraph.from_triples([("a", "b", "c")]).save(tmp_path)
    assert same(KnowledgeGraph.load(tmp_path, verify=True), animals())
    assert len(list(tmp_path.iterdir())) == 2


def test_folders_that_are_no_graph(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        KnowledgeGraph.load(tmp_path / "nowhere")
    (tmp_path / "model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"holds model.bin: expected knowledge_graph.json"):
        KnowledgeGraph.load(tmp_path)
    animals().save(tmp_path)
    description = tmp_path / "knowledge_graph.json"
    whole = description.read_text()
    for text, match in [
        (whole.replace('"format": 2', '"format": 3'), "a newer hf_adapt"),
        (whole.replace('"format": 2', '"format": 1'), "an older hf_adapt"),
        (whole[:30], "damaged"),
        (whole.replace('"arrays"', '"array"'), "does not say what it holds"),
        (whole.replace('"fingerprint"', '"print"'), "its description is incomplete"),
        ("[]", "expected an object"),
    ]:
        assert text != whole
        description.write_text(text)
        with pytest.raises(ValueError, match=match):
            KnowledgeGraph.load(tmp_path)
    description.write_text(whole)
    (triples,) = tmp_path.glob("*/triples.arrow")
    content = triples.read_bytes()
    data = animals().triples.tobytes()
    assert data in content
    triples.write_bytes(content.replace(data, data[::-1]))
    with pytest.raises(ValueError, match="content has changed"):
        KnowledgeGraph.load(tmp_path, verify=True)
    triples.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"triples.arrow is missing or damaged"):
        KnowledgeGraph.load(tmp_path)
    triples.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        KnowledgeGraph.load(tmp_path)


def test_fingerprints() -> None:
    graph = animals()
    assert graph.fingerprint == animals().fingerprint
    others = [
        KnowledgeGraph.from_triples(ANIMALS),
        KnowledgeGraph.from_triples(ANIMALS[::-1]),
        KnowledgeGraph.from_triples(ANIMALS[:-1]),
        KnowledgeGraph.from_triples(ANIMALS, names={"cat": "Cat"}),
        KnowledgeGraph.from_triples(ANIMALS, names={"cat": "cat"}),
        KnowledgeGraph.from_triples(ANIMALS, descriptions={"cat": "cat"}),
    ]
    assert len({graph.fingerprint, *(other.fingerprint for other in others)}) == 7
    # Rows in another order that name the entities in the same order make the same graph.
    swapped = [*ANIMALS[:-2], ANIMALS[-1], ANIMALS[-2]]
    assert KnowledgeGraph.from_triples(swapped).fingerprint == others[0].fingerprint


def test_the_fingerprint_is_that_of_another_process() -> None:
    graph = KnowledgeGraph.from_triples([("a", "b", "c")], names={"a": ["x", "y"]})
    assert graph.fingerprint == "88d82245974e59a62659974b92991c84"  # whatever the hash seed


def test_a_loaded_graph_is_pickled_by_its_folder(tmp_path: Path) -> None:
    rows = np.arange(30_000).reshape(-1, 3)
    graph = KnowledgeGraph.from_triples(rows)
    graph.save(tmp_path)
    assert len(pickle.dumps(graph)) > 100_000
    loaded = KnowledgeGraph.load(tmp_path)
    loaded.neighbours(0)
    assert len(pickle.dumps(loaded)) < 1_000
    copy = pickle.loads(pickle.dumps(loaded))
    assert is_mapped(copy.triples, "triples.arrow") and same(copy, graph)


def test_a_graph_takes_little_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entities, triples = 20_000, 100_000
    rows = {
        "head": rng.integers(0, entities, triples),
        "relation": rng.integers(0, 20, triples),
        "tail": rng.integers(0, entities, triples),
    }
    names = {str(i): f"the name of {i}" for i in range(entities)}
    tracemalloc.start()
    graph = KnowledgeGraph.from_triples(rows, names=names)
    graph.entity("17"), graph.neighbours(0)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 12 bytes for a triple and 4 for its place by tail; for an entity its texts and six numbers.
    assert size < 16 * triples + 120 * entities
