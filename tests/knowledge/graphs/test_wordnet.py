"""WordNet's own file format, on a few made-up synsets."""

from pathlib import Path

import pytest

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by\n"
FILES = {
    "data.noun": (
        "00000100 05 n 02 dog 0 domestic_dog 0 002 @ 00000200 n 0000 ! 00000300 n 0101 "
        '| a domesticated canid; "the dog barked"  \n'
        "00000200 05 n 01 canine 0 001 ~ 00000100 n 0000 | a canid  \n"
        "00000300 05 n 0b cat 0 true_cat 0 c3 0 c4 0 c5 0 c6 0 c7 0 c8 0 c9 0 c10 0 New_York 0 "
        "003 ! 00000100 n 0101 ! 00000100 n 0201 = 00000500 a 0000 | eleven words  \n"
    ),
    "data.verb": "00000100 38 v 01 dog 0 001 + 00000100 n 0101 01 + 08 00 | go after  \n",
    "data.adj": (
        "00000500 00 a 01 canine 0 001 & 00000600 a 0000 | of dogs  \n"
        "00000600 00 s 02 galore(ip) 0 (a)b(p) 0 001 & 00000500 a 0000 | in great numbers  \n"
    ),
    "data.adv": "00000100 02 r 01 doggedly 0 001 \\ 00000500 a 0101 | with determination\n",
}
SENSES = (
    "dog%1:05:00:: 00000100 1 42\n"
    "dog%2:38:00:: 00000100 1 0\n"
    "canine%1:05:00:: 00000200 2 0\n"
    "canine%3:00:00:: 00000500 1 0\n"
    "galore%5:00:00:many:00 00000600 1 0\n"
)
INDEX = {
    "index.noun": (
        "canine n 1 1 ~ 1 0 00000200  \ndog n 1 2 @ ! 1 1 00000100  \n"
        "cat n 3 1 ! 3 0 00000300 00000200 00000100  \n"
    ),
    "index.verb": "dog v 1 1 + 1 0 00000100  \n",
}


def wordnet(folder: Path, **changed: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = {**FILES, **{name.replace("_", "."): text for name, text in changed.items()}}
    for name, text in files.items():
        licence = LICENCE if name != "index.sense" else ""
        (folder / name).write_text(licence + text, encoding="utf-8")
    return folder


def test_synsets_pointers_and_glosses(tmp_path: Path) -> None:
    graph = KnowledgeGraph.from_wordnet(wordnet(tmp_path))
    keys = [
        "dog.n.00000100",
        "canine.n.00000200",
        "cat.n.00000300",
        "dog.v.00000100",
        "canine.a.00000500",
        "galore.a.00000600",
        "doggedly.r.00000100",
    ]
    assert {graph.key(i) for i in range(len(graph))} == set(keys)
    named = {
        (graph.key(h).split(".0")[0], graph.relations[r], graph.key(t).split(".0")[0])
        for h, r, t in graph.triples.tolist()
    }
    assert named == {
        ("dog.n", "hypernym", "canine.n"),
        ("dog.n", "antonym", "cat.n"),
        ("canine.n", "hyponym", "dog.n"),
        ("cat.n", "antonym", "dog.n"),  # two words of it point to the dog: one triple
        ("cat.n", "attribute", "canine.a"),
        ("dog.v", "derivationally_related", "dog.n"),
        ("canine.a", "similar_to", "galore.a"),
        ("galore.a", "similar_to", "canine.a"),
        ("doggedly.r", "pertains_to", "canine.a"),
    }
    assert graph.names(graph.entity(keys[0])) == ["dog", "domestic dog"]
    assert graph.description(graph.entity(keys[0])) == 'a domesticated canid; "the dog barked"'
    assert len(graph.names(graph.entity(keys[2]))) == 11
    assert graph.names(graph.entity(keys[2]))[-1] == "New York"
    assert graph.names(graph.entity(keys[5])) == ["galore", "(a)b"]


def test_the_folder_around_it(tmp_path: Path) -> None:
    wordnet(tmp_path / "package" / "dict")
    graph = KnowledgeGraph.from_wordnet(tmp_path / "package")
    assert graph.fingerprint == KnowledgeGraph.from_wordnet(tmp_path / "package/dict").fingerprint
    with pytest.raises(FileNotFoundError, match=r"expected a folder with data.noun"):
        KnowledgeGraph.from_wordnet(tmp_path)


def priors(graph: KnowledgeGraph, name: str) -> dict[str, float]:
    return {
        graph.key(entity): round(prior, 4)
        for surface, entity, prior in graph.surfaces()
        if surface == name
    }


def test_priors_follow_how_often_a_sense_was_tagged(tmp_path: Path) -> None:
    graph = KnowledgeGraph.from_wordnet(wordnet(tmp_path, index_sense=SENSES))
    assert priors(graph, "dog") == {
        "dog.n.00000100": round(43 / 44, 4),
        "dog.v.00000100": round(1 / 44, 4),
    }
    # Never tagged: the earlier sense is likelier, and both together are certain.
    assert priors(graph, "canine") == {
        "canine.a.00000500": round(2 / 3, 4),
        "canine.n.00000200": round(1 / 3, 4),
    }
    assert priors(graph, "galore") == {"galore.a.00000600": 1.0}


def test_priors_from_the_order_of_senses(tmp_path: Path) -> None:
    nouns = FILES["data.noun"].replace("01 canine 0", "02 canine 0 dog 0")
    index = INDEX["index.noun"].replace(
        "dog n 1 2 @ ! 1 1 00000100", "dog n 2 2 @ ! 2 1 00000200 00000100"
    )
    folder = wordnet(tmp_path, data_noun=nouns, index_noun=index, index_verb=INDEX["index.verb"])
    assert priors(KnowledgeGraph.from_wordnet(folder), "dog") == {
        "canine.n.00000200": 0.4,
        "dog.n.00000100": 0.2,
        "dog.v.00000100": 0.4,
    }


def test_all_priors_are_positive_and_add_up_to_one(tmp_path: Path) -> None:
    for index in ({}, {"index_sense": SENSES}):
        folder = wordnet(tmp_path / str(len(index)), **index)
        graph = KnowledgeGraph.from_wordnet(folder)
        total: dict[str, float] = {}
        for name, _, prior in graph.surfaces():
            assert prior > 0
            total[name] = total.get(name, 0.0) + prior
        assert list(total.values()) == pytest.approx([1.0] * len(total))


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("data_verb", "00000100 38 v zz dog 0 000 | x\n", r"data.verb.*line 2: not a synset"),
        ("data_verb", "00000100 38 v 01 dog 0 002 + 00000100 n 0101 | x\n", "words or pointers"),
        ("data_verb", "00000100 38 v 01 dog 0 001 + 00000700 n 0101 | x\n", "there is no synset 0"),
        ("data_verb", "00000100 38 v 01 dog 0 001 ? 00000100 n 0101 | x\n", r"'\?'"),
        ("index_sense", SENSES + "dog%1:05:00:: 00000100 1\n", r"index.sense.*line 6: not a sense"),
        ("index_noun", "dog n x\n", r"index.noun.*line 2: not an index line"),
    ],
)
def test_malformed_files(file: str, text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s){match}"):
        KnowledgeGraph.from_wordnet(wordnet(tmp_path, **{file: text}))


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    (wordnet(tmp_path) / "data.adv").unlink()
    with pytest.raises(FileNotFoundError, match=r"data.adv"):
        KnowledgeGraph.from_wordnet(tmp_path)
