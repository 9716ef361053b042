"""Each format is read as written, and what is malformed is named by its line."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import networkx
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph

ROWS = [("a", "r", "b"), ("b", "s", "c"), ("NA", "r", "null"), ("é", "r", "a b")]
COLUMNS = {name: [row[i] for row in ROWS] for i, name in enumerate(("head", "relation", "tail"))}


def rows_of(graph: KnowledgeGraph) -> set[tuple[str, str, str]]:
    return {(graph.key(h), graph.relations[r], graph.key(t)) for h, r, t in graph.triples.tolist()}


def write(path: Path, text: str | bytes) -> Path:
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def text_of(separator: str, header: bool = True) -> str:
    rows = [("head", "relation", "tail"), *ROWS] if header else ROWS
    return "".join(separator.join(row) + "\n" for row in rows)


def parquet(folder: Path) -> Path:
    pa.parquet.write_table(pa.table(COLUMNS), folder / "t.parquet")
    return folder / "t.parquet"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "tsv": lambda folder: write(folder / "t.tsv", text_of("\t")),
    "tsv without header": lambda folder: write(folder / "t.tsv", text_of("\t", False)),
    "txt": lambda folder: write(folder / "t.txt", text_of("\t", False)),
    "tsv.gz": lambda folder: write(folder / "t.tsv.gz", text_of("\t")),
    "csv": lambda folder: write(folder / "t.csv", text_of(",")),
    "csv.gz": lambda folder: write(folder / "t.csv.gz", text_of(",")),
    "quoted tsv": lambda folder: write(
        folder / "t.tsv", text_of('"\t"').replace("\n", '"\n"').join('""')[:-2]
    ),
    "byte order mark": lambda folder: write(folder / "t.csv", "\ufeff" + text_of(",")),
    "windows lines": lambda folder: write(folder / "t.tsv", text_of("\t").replace("\n", "\r\n")),
    "mark and no header": lambda folder: write(folder / "t.csv", "\ufeff" + text_of(",", False)),
    "mark and quotes": lambda folder: write(
        folder / "t.csv", "\ufeff" + text_of('","', False).replace("\n", '"\n"').join('""')[:-2]
    ),
    "mark in .gz": lambda folder: write(folder / "t.tsv.gz", "\ufeff" + text_of("\t")),
    "lone CR": lambda folder: write(folder / "t.csv", text_of(",").replace("\n", "\r")),
    "lone CR without header": lambda folder: write(
        folder / "t.tsv", text_of("\t", False).replace("\n", "\r")
    ),
    "blanks": lambda folder: write(folder / "t.csv", "\n" + text_of(" , ").replace("\n", "\n\n")),
    "parquet": parquet,
    "rows": lambda folder: ROWS,
    "lists": lambda folder: [list(row) for row in ROWS],
    "generator": lambda folder: iter(ROWS),
    "dicts": lambda folder: datasets.Dataset.from_dict(COLUMNS).to_list(),
    "array": lambda folder: np.array(ROWS),
    "mapping": lambda folder: COLUMNS,
    "pandas": lambda folder: pandas.DataFrame(COLUMNS),
    "categories": lambda folder: pandas.DataFrame(COLUMNS).astype("category"),
    "arrow": lambda folder: pa.table(COLUMNS),
    "dataset": lambda folder: datasets.Dataset.from_dict(COLUMNS),
    "chosen rows": lambda folder: datasets.Dataset.from_dict(
        {k: [*v[::-1], "x"] for k, v in COLUMNS.items()}
    ).select([3, 2, 1, 0]),
    "stream": lambda folder: datasets.Dataset.from_dict(COLUMNS).to_iterable_dataset(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_graph(source: str, tmp_path: Path) -> None:
    graph = KnowledgeGraph.from_triples(SOURCES[source](tmp_path))
    assert rows_of(graph) == set(ROWS)
    assert graph.fingerprint == KnowledgeGraph.from_triples(ROWS).fingerprint
    assert [graph.key(i) for i in range(len(graph))] == ["a", "b", "c", "NA", "null", "é", "a b"]


def test_columns_of_other_names_and_more_columns(tmp_path: Path) -> None:
    text = "score,to,by,from\n1,b,r,a\n2,c,r,b\n"
    columns = {"head": "from", "relation": "by", "tail": "to"}
    graph = KnowledgeGraph.from_triples(write(tmp_path / "t.csv", text), **columns)
    assert rows_of(graph) == {("a", "r", "b"), ("b", "r", "c")}
    with pytest.raises(ValueError, match=r"line 1: expected a header with the columns head"):
        KnowledgeGraph.from_triples(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"there is no column 'head'.*'from', 'by', 'to'"):
        KnowledgeGraph.from_triples(pandas.DataFrame({"from": ["a"], "by": ["r"], "to": ["b"]}))


def test_a_header_with_other_names_is_not_a_triple(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", "subject\tpredicate\tobject\na\tr\tb\n")
    with pytest.raises(ValueError, match="Name the file's columns"):
        KnowledgeGraph.from_triples(path)


HEADED = "source,effect,target\naspirin,treats,pain\nx,treats,y\nz,causes,pain\nu,causes,v\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (HEADED, r"line 1: 'source', 'effect', 'target' look like the names of the columns"),
        ("\n" + HEADED, r"line 2: .*pass head='source', relation='effect', tail='target'"),
        ("head_id,rel_type,tail_id\na,r,b\n", "line 1: expected a header with the columns head"),
    ],
)
def test_a_header_of_unknown_names_is_not_a_triple(text: str, match: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(ValueError, match=match):
        KnowledgeGraph.from_triples(path)
    if "effect" in text:
        columns = {"head": "source", "relation": "effect", "tail": "target"}
        assert len(rows_of(KnowledgeGraph.from_triples(path, **columns))) == 4
        write(path, "head,relation,tail\n" + text)
        assert len(rows_of(KnowledgeGraph.from_triples(path))) == 5


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("Abdication,involves,King", True),
        ("drug,effect,illness", True),
        ("name,likes,label", False),
        ("e1,type,node", False),
    ],
)
def test_a_first_triple_of_words_is_no_header(
    first: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"e{i},likes,e{i + 1}" for i in range(20)]
    path = write(tmp_path / "t.csv", "\n".join([first, *rows]))
    assert len(rows_of(KnowledgeGraph.from_triples(path))) == 21
    assert ("are read as a triple, but no other row" in caplog.text) == told


def test_a_first_triple_like_no_other_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text in ("a,r,b\n", "a,r,b\nc,r,d\ne,s,f\ng,s,h\n", "a,r,b\nc,s,a\n"):
        KnowledgeGraph.from_triples(write(tmp_path / "t.csv", text))
    assert not caplog.records
    graph = KnowledgeGraph.from_triples(write(tmp_path / "t.csv", "a,r,b\nc,s,d\ne,s,f\n"))
    assert len(rows_of(graph)) == 3
    (record,) = caplog.records
    assert "'a', 'r', 'b' are read as a triple, but no other row has" in record.getMessage()


def test_names_with_a_header_of_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "n.csv", "concept_id,title\nq1,cat\n")
    with pytest.raises(
        ValueError, match="line 1: expected a header with the columns entity, name"
    ) as e:
        KnowledgeGraph.from_triples([("q1", "r", "q2")], names=path)
    assert "Call the columns entity and name" in str(e.value) and "head=" not in str(e.value)
    pandas.DataFrame({"id": ["q1"], "title": ["cat"]}).to_parquet(tmp_path / "n.parquet")
    with pytest.raises(
        ValueError, match=r"no column 'entity'.*Call the columns entity and name"
    ) as e:
        KnowledgeGraph.from_triples([("q1", "r", "q2")], names=tmp_path / "n.parquet")
    assert "head=" not in str(e.value)


def test_numbers_are_keys() -> None:
    graph = KnowledgeGraph.from_triples([(1, "r", 2), (np.int64(2), 7, "x")])
    assert rows_of(graph) == {("1", "r", "2"), ("2", "7", "x")}


def test_quotation_marks(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'a,r,"b, ""the"" second"\n"two\nlines",r,b\n')
    assert rows_of(KnowledgeGraph.from_triples(path)) == {
        ("a", "r", 'b, "the" second'),
        ("two\nlines", "r", "b"),
    }
    path = write(tmp_path / "t.tsv", 'a\tr\t"b\n"c\tr\td"\n')
    assert rows_of(KnowledgeGraph.from_triples(path)) == {("a", "r", '"b'), ('"c', "r", 'd"')}


def test_a_quoted_header(tmp_path: Path) -> None:
    text = '"the score, if any","tail",relation,"head"\n1,"b\n""c""",r,a 5" long\n'
    graph = KnowledgeGraph.from_triples(write(tmp_path / "t.csv", text))
    assert rows_of(graph) == {('a 5" long', "r", 'b\n"c"')}


GOOD = "a\tr\tb\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (GOOD + "a\tr\n" + GOOD, r"line 2: expected 3 columns \(head, relation, tail\), got 2"),
        (GOOD * 2 + "a\tr\tb\tc\n", r"line 3: expected 3 columns .* got 4: 'a\\tr\\tb\\tc'"),
        (GOOD + "a\t\tb\n", r"line 2: the column 'relation' is empty"),
        (GOOD + "a\tr\t \n", r"line 2: the column 'tail' is empty"),
        ("head\trelation\ttail\n" + GOOD + "\tr\tb\n", r"line 3: the column 'head' is empty"),
        (GOOD.encode() + b"caf\xe9\tr\tb\n", r"line 2: expected UTF-8, got byte 0xe9 at position"),
        (GOOD + "\n" + "a\n", r"line 3: expected 3 columns .* got 1"),
        ("a,r,b\n", r"line 1: expected 3 columns .* got 1: 'a,r,b'. The separator is '\\t'"),
        ("", "is empty"),
        ("head\trelation\ttail\n", "holds no triples"),
        ("head\trelation\ttail\thead\na\tr\tb\tc\n", "the column 'head' is there twice"),
    ],
)
@pytest.mark.parametrize("ending", ["tsv", "tsv.gz"])
def test_malformed_lines(text: str | bytes, match: str, ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"t.{ending}", text)
    with pytest.raises(ValueError, match=f"(?s){path.name}.*{match}"):
        KnowledgeGraph.from_triples(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('a,r,b\na,r,"b\nc,d\n', r"line 2: unexpected end of data"),
        ('a,r,"b\nc,r,d\n', r"line 1: .*a quotation mark is opened here and never closed"),
        ('a,r,b\nc,r,"d\ne,r,"f\ng,r,h\n', r"line 2: .*expected after"),
        ("a,r,b\rc,r\rd,r,e\r", r"line 2: expected 3 columns .* got 2"),
        ('a,r,"b\nb"\na,r\n', r"line 3: expected 3 columns .* got 2"),
        ("a,r,b\na,,b\n", r"line 2: the column 'relation' is empty"),
        ('a,r,b\n\n"NY" city,r,b\n', r"line 3: ',' expected after the closing quotation mark"),
        ('"a\n\nb",r,c\r\n\r\n"a",r\r\n', r"line 5: expected 3 columns .* got 2"),
    ],
)
def test_malformed_quoted_lines(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        KnowledgeGraph.from_triples(write(tmp_path / "t.csv", text))


def test_many_malformed_lines_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", GOOD + "a\tb\n" * 12)
    with pytest.raises(ValueError, match=r"12 malformed lines") as raised:
        KnowledgeGraph.from_triples(path)
    assert str(raised.value).count("expected 3 columns") == 5
    assert "and 7 more" in str(raised.value)


@pytest.mark.parametrize(
    ("triples", "match"),
    [
        ([("a", "r", "b"), ("a", "r")], r"triples\[1\]: expected 3 cells .* got 2"),
        (["abc"], r"triples\[0\]: expected \(head, relation, tail\), got 'abc'"),
        (["a", "b"], r"^triples\[0:2\]: 2 malformed rows\.\n  triples\[0\]: "),
        (
            [("a", "r", "b")] * 70_000 + [("a", None, "b")],
            r"'relation' is empty in the rows 70000 \(",
        ),
        ([("a", "r", 1.5)], "the tail must be text or a whole number, got 1.5"),
        ([(" ", "r", 2)], "the head is empty"),
        ([(" ", "r", "b")], r"'head' is empty in the rows 0"),
        ([{"head": "a", "tail": "b"}], "expected the keys head, relation, tail, got head, tail"),
        ([], "holds no triples"),
        (np.zeros((2, 4), int), r"expected the shape \(triples, 3\), got \(2, 4\)"),
        ({"head": ["a"], "relation": ["r"], "tail": [1.5]}, "'tail' must hold text or whole"),
        (
            pandas.DataFrame({"head": ["a", None], "relation": ["r", "r"], "tail": ["b", "c"]}),
            r"'head' is empty in the rows 1 \(counted from 0\)",
        ),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict(COLUMNS)), r"triples\['train'\]"),
    ],
)
def test_malformed_rows(triples: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        KnowledgeGraph.from_triples(triples)


def test_what_no_triples_are_in(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot be read from a int"):
        KnowledgeGraph.from_triples(3)
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        KnowledgeGraph.from_triples(tmp_path / "t.tsv")
    with pytest.raises(ValueError, match=r"from_rdf\(...\) reads .ttl"):
        KnowledgeGraph.from_triples(tmp_path / "t.ttl")
    with pytest.raises(ValueError, match=r"KnowledgeGraph.load"):
        KnowledgeGraph.from_triples(tmp_path)
    path = write(tmp_path / "t.dat", "a|r|b\n")
    with pytest.raises(ValueError, match="or separator="):
        KnowledgeGraph.from_triples(path)
    assert rows_of(KnowledgeGraph.from_triples(path, separator="|")) == {("a", "r", "b")}


def test_names_and_descriptions_from_files(tmp_path: Path) -> None:
    names = write(tmp_path / "n.tsv", "entity\tname\nq1\tcat\nq2\tfeline\nq1\tpuss\nq1\tcat\n")
    texts = write(tmp_path / "d.csv", 'q1,"an animal, small"\nq1,"an animal, small"\n')
    graph = KnowledgeGraph.from_triples([("q1", "r", "q2")], names=names, descriptions=texts)
    assert graph.names(0) == ["cat", "puss"] and graph.names(1) == ["feline"]
    assert graph.description(0) == "an animal, small" and graph.description(1) is None


def test_malformed_names_and_descriptions(tmp_path: Path) -> None:
    triples = [("q1", "r", "q2")]
    path = write(tmp_path / "n.tsv", "q1\tcat\nq2\n")
    with pytest.raises(ValueError, match=r"line 2: expected 2 columns \(entity, name\), got 1"):
        KnowledgeGraph.from_triples(triples, names=path)
    with pytest.raises(TypeError, match=r"names must be a mapping .* got a list"):
        KnowledgeGraph.from_triples(triples, names=["cat"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'name' is empty"):
        KnowledgeGraph.from_triples(triples, names={"q1": ""})
    with pytest.raises(ValueError, match="Every name of names"):
        KnowledgeGraph.from_triples(triples, names={"q1": [3]})  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"1 descriptions are .* \(dangling ids\): 'q3'"):
        KnowledgeGraph.from_triples(triples, descriptions={"q1": "x", "q3": "y"})
    path = write(tmp_path / "d.tsv", "q1\tx\nq2\ty\nq1\tz\n")
    with pytest.raises(ValueError, match=r"1 descriptions differ from an earlier one .* 'q1'"):
        KnowledgeGraph.from_triples(triples, descriptions=path)


MISSING = [None, float("nan"), np.float32("nan"), pandas.NA, pandas.NaT]


@pytest.mark.parametrize("missing", MISSING, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("source", ["mapping", "list", "networkx", "pandas"])
def test_missing_names_and_descriptions_are_left_out_and_counted(
    source: str, missing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What looks like a missing value in text stays text."""
    names: dict[str, Any] = {"q1": missing, "q2": "nan", "q3": "NA"}
    texts: dict[str, Any] = {"q1": missing, "q2": "None", "q3": missing}
    triples = [("q1", "r", "q2"), ("q2", "r", "q3")]
    if source == "list":
        names = {"q1": [missing, missing], "q2": ["nan", missing], "q3": ("NA",)}
    if source == "pandas":
        frame = pandas.DataFrame({"name": names, "description": texts})
        names, texts = frame["name"].to_dict(), frame["description"].to_dict()
    if source == "networkx":
        made = networkx.DiGraph([("q1", "q2"), ("q2", "q3")])
        for key in names:
            made.add_node(key, name=names[key], description=texts[key])
        graph = KnowledgeGraph.from_networkx(made)
    else:
        graph = KnowledgeGraph.from_triples(triples, names=names, descriptions=texts)
    assert [graph.label(i) for i in range(3)] == ["q1", "nan", "NA"]
    assert [graph.description(i) for i in range(3)] == [None, "None", None]
    counts = [record.getMessage() for record in caplog.records]
    assert len(counts) == 2
    missing_names = "3 missing values" if source == "list" else "1 missing value"
    assert f"left out {missing_names} (None or NaN)" in counts[0]
    assert "left out 2 missing values (None or NaN), the first of 'q1'" in counts[1]


@pytest.mark.parametrize("missing", MISSING, ids=lambda value: type(value).__name__)
def test_missing_keys_and_cells_are_errors_with_their_place(missing: Any) -> None:
    triples = [("q1", "r", "q2")]
    with pytest.raises(ValueError, match=r"names=\{...\}: expected keys that are text"):
        KnowledgeGraph.from_triples(triples, names={missing: "x"})
    with pytest.raises(ValueError, match=r"triples\[1\]: the tail|'tail' is empty in the rows 1 "):
        KnowledgeGraph.from_triples([*triples, ("q1", "r", missing)])
    frame = pandas.DataFrame(triples, columns=["head", "relation", "tail"]).astype(object)
    frame.loc[1] = [missing, "r", "q2"]
    with pytest.raises(ValueError, match="'head' is empty in the rows 1 "):
        KnowledgeGraph.from_triples(frame)
    source = networkx.DiGraph()
    source.add_edge("q1", "q2", relation=missing)
    with pytest.raises(ValueError, match="The edge from 'q1' to 'q2' has relation="):
        KnowledgeGraph.from_networkx(source)
    if missing is not None:  # networkx refuses that itself
        with pytest.raises(ValueError, match=r"missing value .* as a node"):
            KnowledgeGraph.from_networkx(networkx.DiGraph([("q1", missing)]))


def test_names_from_rows_of_a_dataset() -> None:
    rows = datasets.Dataset.from_dict({"id": ["q1", "q2"], "label": ["cat", None]})
    names = {row["id"]: row["label"] for row in rows}
    graph = KnowledgeGraph.from_triples([("q1", "r", "q2")], names=names)
    assert [graph.label(i) for i in range(2)] == ["cat", "q2"]
    with pytest.raises(ValueError, match=r"Every name of names=\{...\} must be text; 'q2' has 3"):
        KnowledgeGraph.from_triples([("q1", "r", "q2")], names={"q1": None, "q2": 3})  # type: ignore[dict-item]


TURTLE = """
@prefix : <http://x.org/> .
@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
@prefix owl: <http://www.w3.org/2002/07/owl#> .
:aspirin a owl:Class ; rdfs:label "Aspirin"@en , "Aspirine"@fr ;
  skos:altLabel "ASA" , "acetylsalicylic acid"@en-GB ; rdfs:comment "a drug"@en ;
  :treats :headache ; rdfs:subClassOf :drug ,
    [ a owl:Restriction ; owl:onProperty :inhibits ; owl:someValuesFrom :cox ] ;
  :mass 180.2 ; :maker [ :city :leverkusen ] .
:treats a owl:ObjectProperty ; rdfs:label "treats"@en .
:headache skos:prefLabel "headache" .
:alone rdfs:label "Alone"@en .
"""
X = "http://x.org/"
SUBCLASS = "http://www.w3.org/2000/01/rdf-schema#subClassOf"


def check_rdf(graph: KnowledgeGraph) -> None:
    assert rows_of(graph) == {
        (f"{X}aspirin", f"{X}treats", f"{X}headache"),
        (f"{X}aspirin", SUBCLASS, f"{X}drug"),
        (f"{X}aspirin", f"{X}inhibits", f"{X}cox"),
    }
    keys = [graph.key(i) for i in range(len(graph))]
    assert keys == [f"{X}{name}" for name in ("alone", "aspirin", "cox", "drug", "headache")]
    assert graph.names(1) == ["Aspirin", "ASA", "acetylsalicylic acid"]
    assert (graph.description(1), graph.label(4)) == ("a drug", "headache")


@pytest.mark.parametrize(
    ("ending", "format"), [("ttl", "turtle"), ("nt.gz", "nt"), ("owl", "xml"), ("xml", "xml")]
)
def test_rdf_in_each_format(ending: str, format: str, tmp_path: Path) -> None:
    pytest.importorskip("pyoxigraph")
    rdflib = pytest.importorskip("rdflib")
    text = rdflib.Graph().parse(data=TURTLE, format="turtle").serialize(format=format)
    path = write(tmp_path / f"t.{ending}", text)
    graph = KnowledgeGraph.from_rdf(path)
    check_rdf(graph)
    marked = write(tmp_path / f"marked.{ending}", "\ufeff" + text.replace("\n", "\r"))
    check_rdf(KnowledgeGraph.from_rdf(marked))
    plain = KnowledgeGraph.from_rdf(write(tmp_path / "plain.ttl", TURTLE))
    assert graph.fingerprint == plain.fingerprint  # RDF has no order


def test_rdf_of_another_language(tmp_path: Path) -> None:
    pytest.importorskip("pyoxigraph")
    path = write(tmp_path / "t.ttl", TURTLE)
    french = KnowledgeGraph.from_rdf(path, language="fr")
    assert french.label(french.entity(f"{X}aspirin")) == "Aspirine"
    every = KnowledgeGraph.from_rdf(path, language=None)
    assert every.names(1)[:2] == ["Aspirin", "Aspirine"]
    own = KnowledgeGraph.from_rdf(
        path, label_predicates=["http://www.w3.org/2004/02/skos/core#altLabel"]
    )
    assert own.label(own.entity(f"{X}aspirin")) == "ASA"


def test_malformed_rdf(tmp_path: Path) -> None:
    pytest.importorskip("pyoxigraph")
    path = write(tmp_path / "t.ttl", "<a> <b> <c> .\n<a> <b .\n")
    with pytest.raises(ValueError, match=r"t.ttl cannot be read as turtle: .*line[ :]*2"):
        KnowledgeGraph.from_rdf(path)
    with pytest.raises(ValueError, match="format=None is unknown"):
        KnowledgeGraph.from_rdf(tmp_path / "t.dat")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        KnowledgeGraph.from_rdf(tmp_path / "other.ttl")
    literal = write(tmp_path / "t.nt", '<http://a> <http://b> "c" .\n')
    with pytest.raises(ValueError, match="holds no triples"):
        KnowledgeGraph.from_rdf(literal)


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("nt", "<x:a> <x:p> <x:b> .\n<x:a b> <x:p> <x:c> .\n<x:b> <x:p> <x:c> .\nword\n"),
        ("ttl", "<x:a> <x:p> <x:b> ; <x:q> <{> .\n<x:b> <x:p> <x:c> . <x:b> <x:p> <<> .\n"),
        (
            "owl",
            '<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:x="x:">'
            + "".join(
                f'<r:Description r:about="x:{a}"><x:p r:resource="x:{b}"/></r:Description>'
                for a, b in ("ab", ("a", "b c"), "bc", ("{", "a"))
            )
            + "</r:RDF>",
        ),
    ],
)
def test_malformed_statements_are_left_out_and_counted(
    ending: str, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pyoxigraph")
    path = write(tmp_path / f"dump.{ending}", text)
    with pytest.raises(ValueError, match="pass malformed='skip' to leave such statements out"):
        KnowledgeGraph.from_rdf(path)
    assert not caplog.records
    graph = KnowledgeGraph.from_rdf(path, malformed="skip")
    assert rows_of(graph) == {("x:a", "x:p", "x:b"), ("x:b", "x:p", "x:c")}
    (record,) = caplog.records
    assert "left out 2 malformed statements, the first: " in record.getMessage()
    assert "IRI" in record.getMessage()


def test_an_open_quotation_costs_one_statement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pyoxigraph")
    lines = [f"<x:{i}> <x:p> <x:b> ." for i in range(40)]
    lines[10], lines[30] = '<x:q> <x:p> "never closed .', '<x:q> <x:p> "closed" .'
    path = write(tmp_path / "dump.nt", "\n".join(lines))
    assert len(rows_of(KnowledgeGraph.from_rdf(path, malformed="skip"))) == 38
    (record,) = caplog.records
    assert "left out 1 malformed statement, the first: line 11: " in record.getMessage()
    # Turtle has no lines: where a quotation ends, only its author knows.
    for mark in ('"', '"""'):
        lines[10] = lines[10].replace('"', mark)
        path = write(tmp_path / "dump.ttl", "\n".join(lines))
        with pytest.raises(ValueError, match=r"dump.ttl cannot be read as turtle: .*line 11 ") as e:
            KnowledgeGraph.from_rdf(path, malformed="skip")
        assert "malformed='skip'" not in str(e.value) or "cannot leave" in str(e.value)
        lines[30] = lines[29]
    write(path, "\n".join([*lines[:5], "<x:q> <x:p> <x:b> ; <x:p>"]))
    with pytest.raises(ValueError, match="Unexpected end"):
        KnowledgeGraph.from_rdf(path, malformed="skip")


@pytest.mark.parametrize("ending", ["csv", "obo", "nt", "ttl", "owl"])
@pytest.mark.parametrize("malformed", ["error", "skip"])
def test_compressed_files_that_are_not_whole(ending: str, malformed: str, tmp_path: Path) -> None:
    """Also beyond the first block, which is read to look for a header."""
    pytest.importorskip("pyoxigraph")
    read = {"csv": KnowledgeGraph.from_triples, "obo": KnowledgeGraph.from_obo}.get(
        ending, KnowledgeGraph.from_rdf
    )
    options = {"malformed": malformed} if ending in ("nt", "ttl", "owl") else {}
    numbers = np.random.default_rng(0).integers(0, 1 << 60, 8_000).tolist()
    lines = {
        "csv": "{0},r,b\n",
        "obo": "[Term]\nid: A:{0}\nname: a\n",
        "owl": '<r:Description r:about="x:a{0}"><x:p r:resource="x:b"/></r:Description>',
    }
    text = "".join(lines.get(ending, "<x:{0}> <x:p> <x:b> .\n").format(n) for n in numbers)
    if ending == "owl":
        text = f'<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:x="x:">{text}'
    whole = gzip.compress(text.encode())
    for content in (whole[:60], whole[:-1000], whole[:-4], text.encode()):
        path = tmp_path / f"t.{ending}.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"t.{ending}.gz is not a whole gzip file") as raised:
            read(path, **options)
        assert "malformed" not in str(raised.value)


def test_endings_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "T.CSV.GZ"
    path.write_bytes(gzip.compress(text_of(",").encode()))
    assert rows_of(KnowledgeGraph.from_triples(path)) == set(ROWS)


def test_what_cannot_be_left_out(tmp_path: Path) -> None:
    pytest.importorskip("pyoxigraph")
    path = write(
        tmp_path / "t.owl", '<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"></r:X>'
    )
    with pytest.raises(ValueError, match="cannot be read as xml") as raised:
        KnowledgeGraph.from_rdf(path, malformed="skip")
    assert "one of 'turtle', 'ntriples', 'xml'" in str(raised.value)
    with pytest.raises(ValueError, match="malformed='ignore': expected 'error' or 'skip'"):
        KnowledgeGraph.from_rdf(path, malformed="ignore")  # type: ignore[arg-type]


def test_deprecated_entities_and_broad_synonyms_of_owl(tmp_path: Path) -> None:
    pytest.importorskip("pyoxigraph")
    text = (
        TURTLE
        + """
    @prefix oio: <http://www.geneontology.org/formats/oboInOwl#> .
    :old owl:deprecated true ; rdfs:label "Old" ; rdfs:comment "gone" ; rdfs:subClassOf :drug .
    :headache :was :old ; owl:deprecated false ; oio:hasBroadSynonym "pain" ;
      oio:hasExactSynonym "cephalgia" .
    """
    )
    graph = KnowledgeGraph.from_rdf(write(tmp_path / "t.ttl", text))
    check_rdf(graph)
    assert graph.names(4) == ["headache", "cephalgia"]
    broad = "http://www.geneontology.org/formats/oboInOwl#hasBroadSynonym"
    own = KnowledgeGraph.from_rdf(tmp_path / "t.ttl", alias_predicates=[broad])
    assert own.names(4) == ["headache", "pain"]


def test_rdf_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyoxigraph", None)
    with pytest.raises(ImportError, match=r'pip install "hf-adapt\[knowledge\]"'):
        KnowledgeGraph.from_rdf(write(tmp_path / "t.ttl", TURTLE))


OBO = r"""format-version: 1.2
! a comment
[Term]
id: X:1
name: heart attack
def: "Death of \"heart\" muscle." [PMID:1]
synonym: "myocardial infarction" EXACT []
synonym: "MI" RELATED ABBREVIATION []
is_a: X:2 {source="y"} ! heart disease
relationship: part_of Y:9 ! of another ontology
is_a: X:3 ! an obsolete one

[Term]
id: X:2
name: heart disease

[Term]
id: X:3
name: obsolete thing
is_obsolete: true
is_a: X:2

[Term]
id: X:4
name: alone

[Typedef]
id: part_of
name: part of
"""


@pytest.mark.parametrize("ending", ["obo", "obo.gz"])
def test_obo(ending: str, tmp_path: Path) -> None:
    graph = KnowledgeGraph.from_obo(write(tmp_path / f"x.{ending}", OBO))
    old = write(tmp_path / f"old.{ending}", "\ufeff" + OBO.replace("\n", "\r"))
    assert KnowledgeGraph.from_obo(old).fingerprint == graph.fingerprint
    assert rows_of(graph) == {("X:1", "is_a", "X:2"), ("X:1", "part_of", "Y:9")}
    attack = graph.entity("X:1")
    assert graph.names(attack) == ["heart attack", "myocardial infarction", "MI"]
    assert graph.description(attack) == 'Death of "heart" muscle.'
    assert graph.names(graph.entity("Y:9")) == ["Y:9"]
    assert graph.label(graph.entity("X:4")) == "alone"
    with pytest.raises(KeyError, match="No entity has the key 'X:3'"):
        graph.entity("X:3")


def test_obo_of_old_and_merged_terms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (
        OBO.replace("[Term]\nid: X:2", "[term]\nid: X:2\nalt_id: X:20\nalt_id: X:3")
        + """
[Term]
id: X:5
name: five
exact_synonym: "quintet" [a:b]
related_synonym: "fives" []
narrow_synonym: "high five" []
broad_synonym: "number" []
synonym: "integer" BROAD []
synonym: "cinq" []
is_a: X:20 ! merged into X:2
is_a: Z:404
"""
    )
    caplog.set_level("INFO")
    graph = KnowledgeGraph.from_obo(write(tmp_path / "x.obo", text))
    five = graph.entity("X:5")
    assert graph.names(five) == ["five", "quintet", "fives", "high five", "cinq"]
    # X:3 is obsolete and merged into X:2; X:20 is no term of its own.
    assert rows_of(graph) == {
        ("X:1", "is_a", "X:2"),
        ("X:1", "part_of", "Y:9"),
        ("X:5", "is_a", "X:2"),
        ("X:5", "is_a", "Z:404"),
    }
    first, second = (record.getMessage() for record in caplog.records)
    assert "left out 2 broad synonyms" in first
    assert "edges point to 2 ids without a term in it, such as Y:9" in second


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (OBO + "[Term]\nid X5\n", r"line 31: expected `tag: value`, got 'id X5'"),
        (OBO + "[Term]\nname: x\n", r"line 30: expected an id: in this \[Term\], got none"),
        (OBO + "[Term]\nid: X:1\n", r"line 30: the id X:1 was given in line 3 already"),
        (OBO.replace('muscle." [', "muscle. ["), r'line 6: expected def: "text" in quotation'),
        (OBO.replace("part_of Y:9", "part_of"), "line 10: expected relationship: relation id"),
        (OBO.replace("name: alone", "name:"), "line 25: the name is empty"),
        ("format-version: 1.2\n", "holds no triples"),
    ],
)
def test_malformed_obo(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        KnowledgeGraph.from_obo(write(tmp_path / "x.obo", text))


def test_obo_that_is_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "x.obo", OBO.encode() + b"[Term]\nid: X:5\nname: caf\xe9\n")
    with pytest.raises(ValueError, match="line 32: expected UTF-8, got byte 0xe9"):
        KnowledgeGraph.from_obo(path)


@pytest.mark.parametrize("kind", ["DiGraph", "MultiDiGraph", "Graph", "MultiGraph"])
def test_networkx(kind: str) -> None:
    source = getattr(networkx, kind)()
    source.add_node("cat", name=["cat", "puss"], description="an animal")
    source.add_node(7)
    source.add_edge("cat", "feline", relation="is_a")
    source.add_edge("feline", "animal")
    if source.is_multigraph():
        source.add_edge("cat", "feline", key="like")
    graph = KnowledgeGraph.from_networkx(source)
    expected = {("cat", "is_a", "feline"), ("feline", "related_to", "animal")}
    assert rows_of(graph) == expected | ({("cat", "like", "feline")} & ({*rows_of(graph)}))
    assert ("cat", "like", "feline") in rows_of(graph) or not source.is_multigraph()
    cat = graph.entity("cat")
    assert graph.names(cat) == ["cat", "puss"] and graph.description(cat) == "an animal"
    assert graph.neighbours(graph.entity("7")).entities.tolist() == []


def test_networkx_that_is_no_graph() -> None:
    with pytest.raises(TypeError, match="Expected a networkx graph, got a dict"):
        KnowledgeGraph.from_networkx({})
    source = networkx.DiGraph([(1, "1")])
    with pytest.raises(ValueError, match="would have one key, '1'"):
        KnowledgeGraph.from_networkx(source)
    with pytest.raises(ValueError, match="holds no triples"):
        KnowledgeGraph.from_networkx(networkx.DiGraph())
