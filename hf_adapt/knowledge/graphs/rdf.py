"""RDF and OWL files, parsed by pyoxigraph or else rdflib."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

import pyarrow as pa

from hf_adapt.knowledge.graphs.builder import Pairs, build, pairs_from
from hf_adapt.knowledge.graphs.content import Content
from hf_adapt.knowledge.graphs.text_files import counted, kind_of, open_binary, raw_lines
from hf_adapt.knowledge.graphs.triples import read_triples, without
from hf_adapt.storage.string_table import CHUNK

logger = logging.getLogger(__name__)

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
RDFS = "http://www.w3.org/2000/01/rdf-schema#"
OWL = "http://www.w3.org/2002/07/owl#"
SKOS = "http://www.w3.org/2004/02/skos/core#"
OBO_IN_OWL = "http://www.geneontology.org/formats/oboInOwl#"

LABELS = (
    f"{RDFS}label",
    f"{SKOS}prefLabel",
    "http://schema.org/name",
    "https://schema.org/name",
    "http://xmlns.com/foaf/0.1/name",
)
ALIASES = (
    f"{SKOS}altLabel",
    f"{OBO_IN_OWL}hasExactSynonym",
    f"{OBO_IN_OWL}hasRelatedSynonym",
    f"{OBO_IN_OWL}hasNarrowSynonym",  # not broad ones: they mean more than the entity
    "http://schema.org/alternateName",
    "https://schema.org/alternateName",
)
DESCRIPTIONS = (
    f"{SKOS}definition",
    "http://purl.obolibrary.org/obo/IAO_0000115",
    "http://purl.org/dc/terms/description",
    "http://schema.org/description",
    "https://schema.org/description",
    f"{RDFS}comment",
)

LIBRARIES = {  # the names of each format for pyoxigraph and rdflib
    "turtle": ("TURTLE", "turtle"),
    "ntriples": ("N_TRIPLES", "nt"),
    "xml": ("RDF_XML", "xml"),
}
ENDINGS = {
    **dict.fromkeys((".ttl", ".turtle"), "turtle"),
    **dict.fromkeys((".nt", ".ntriples"), "ntriples"),
    **dict.fromkeys((".rdf", ".owl", ".xml"), "xml"),
}

Malformity = Literal["error", "skip"]


class _Statement(NamedTuple):
    """One triple of RDF; its object is an IRI, a blank node, or a text with its language."""

    subject: str
    predicate: str
    object: str
    is_literal: bool = False
    language: str | None = None


def read(
    path: Path,
    format: str | None,
    predicates: tuple[Sequence[str], Sequence[str], Sequence[str]],
    language: str | None,
    malformed: Malformity = "error",
) -> Content:
    """Read the arrays of an RDF file; see [`KnowledgeGraph.from_rdf`]."""
    labels, aliases, descriptions = predicates
    reader = _Reader(language, [*labels, *aliases], descriptions)
    statements = _statements(path, format, malformed)
    columns = read_triples(reader.edges(statements), ("head", "relation", "tail"))
    if reader.left_out:
        number = counted(reader.left_out, "triple")
        logger.info("%s: left out %s with blank nodes.", path, number)
    if reader.deprecated:
        number = counted(len(reader.deprecated), "deprecated entity", "deprecated entities")
        logger.info("%s: left out %s.", path, number)
    names, texts = reader.names.rows(reader), reader.descriptions.rows(reader)
    first = {entity: (entity, text) for entity, text in reversed(texts)}  # one for each
    return build(
        without(columns, reader.deprecated),
        _pairs(names, "name", path),
        _pairs(sorted(first.values()), "description", path),
        isolated=pa.array(sorted(first), pa.large_string()),
        in_order=False,
        source=str(path),
    )


def _pairs(rows: Sequence[tuple[str, str]], what: str, path: Path) -> Pairs:
    return pairs_from([row[0] for row in rows], [row[1] for row in rows], what, str(path))


class _Texts:
    """Names or descriptions of entities.

    Args:
        predicates: Of the texts, the most important first.
    """

    def __init__(self, predicates: Sequence[str]) -> None:
        # A predicate that is both a label and an alias is a label.
        self.rank = {predicate: i for i, predicate in enumerate(dict.fromkeys(predicates))}
        self._found: list[tuple[str, int, str]] = []

    def add(self, subject: str, predicate: str, text: str) -> None:
        """Add the text of an entity."""
        self._found.append((subject, self.rank[predicate], text))

    def rows(self, reader: _Reader) -> list[tuple[str, str]]:
        """Return (entity, text), the more important first; RDF itself has no order."""
        found = sorted(row for row in self._found if not reader.leaves_out(row[0]))
        return [(entity, text) for entity, _, text in found]


class _Reader:
    """Sorts statements into edges, names and descriptions."""

    def __init__(
        self, language: str | None, names: Sequence[str], descriptions: Sequence[str]
    ) -> None:
        self.language = (language or "").lower().partition("-")[0]
        self.names, self.descriptions = _Texts(names), _Texts(descriptions)
        self.predicates: set[str] = set()  # properties are not entities, though they have labels
        self.deprecated: set[str] = set()
        self.left_out = 0

    def leaves_out(self, subject: str) -> bool:
        """Return whether this is no entity of the graph."""
        return subject in self.predicates or subject in self.deprecated

    def edges(self, statements: Iterator[_Statement]) -> Iterator[tuple[str, str, str]]:
        """Iterate over the triples between entities; the rest is kept in this object."""
        of_blank: dict[str, dict[str, str]] = defaultdict(dict)
        to_blank: list[_Statement] = []
        for statement in statements:
            subject, predicate, target = statement[:3]
            if subject.startswith("_:"):
                of_blank[subject][predicate] = target
            elif statement.is_literal:
                self._text(statement)
            elif target.startswith("_:"):
                to_blank.append(statement)
            elif predicate == f"{RDF}type" and target.startswith((RDF, RDFS, OWL, SKOS)):
                if target.endswith("Property"):
                    self.predicates.add(subject)
            else:
                self.predicates.add(predicate)
                yield subject, predicate, target
        self.left_out = len(to_blank)
        for subject, predicate, blank, *_ in to_blank:
            about = of_blank[blank]
            relation = about.get(f"{OWL}onProperty", "_:")
            target = about.get(f"{OWL}someValuesFrom") or about.get(f"{OWL}hasValue") or "_:"
            is_class = predicate in (f"{RDFS}subClassOf", f"{OWL}equivalentClass")
            if is_class and not relation.startswith("_:") and not target.startswith("_:"):
                self.left_out -= 1
                self.predicates.add(relation)
                yield subject, relation, target

    def _text(self, statement: _Statement) -> None:
        subject, predicate, text, _, tag = statement
        if predicate == f"{OWL}deprecated" and text.strip().lower() in ("true", "1"):
            self.deprecated.add(subject)
        spoken = (tag or "").lower().partition("-")[0]  # en-GB is English
        if not text.strip() or (self.language and spoken not in ("", self.language)):
            return
        for texts in (self.names, self.descriptions):
            if predicate in texts.rank:
                texts.add(subject, predicate, text)
                return


def _statements(path: Path, format: str | None, malformed: Malformity) -> Iterator[_Statement]:
    if malformed not in get_args(Malformity):
        raise ValueError(f"malformed={malformed!r}: expected 'error' or 'skip'.")
    kind, formats = format or ENDINGS.get(kind_of(path)), ", ".join(map(repr, LIBRARIES))
    if kind not in LIBRARIES:
        raise ValueError(
            f"{path}: format={format!r} is unknown and the file's ending does not say it. Pass "
            f"format= one of {formats}."
        )
    parse: Any = partial(_with_pyoxigraph, malformed=malformed)
    if importlib.util.find_spec("pyoxigraph") is None:
        if malformed == "skip":
            raise ImportError(
                "malformed='skip' needs pyoxigraph: pip install pyoxigraph. rdflib stops at the "
                "first malformed statement."
            )
        if importlib.util.find_spec("rdflib") is None:
            raise ImportError(
                "KnowledgeGraph.from_rdf needs pyoxigraph (fast) or rdflib: "
                'pip install "hf-adapt[knowledge]".'
            )
        parse = _with_rdflib
    with open_binary(path) as file:
        try:
            yield from parse(file, path, kind)
        except (OSError, EOFError, zlib.error):  # of the file, not of what it says
            raise
        except Exception as error:  # each parser of rdflib has errors of its own kind
            skip = "pass malformed='skip' to leave such statements out (with pyoxigraph), "
            raise ValueError(
                f"{path} cannot be read as {kind}: {error}. Correct the file, "
                f"{skip * (malformed == 'error')}or pass format= one of {formats}."
            ) from error


def _with_pyoxigraph(
    file: IO[bytes], path: Path, kind: str, malformed: Malformity
) -> Iterator[_Statement]:
    oxigraph: Any = importlib.import_module("pyoxigraph")
    parse = partial(
        oxigraph.parse,
        format=getattr(oxigraph.RdfFormat, LIBRARIES[kind][0]),
        base_iri=path.resolve().as_uri(),
    )
    for quad in _recovering(file, parse, path, kind) if malformed == "skip" else parse(file):
        subject, target = quad.subject, quad.object
        start = "_:" * isinstance(subject, oxigraph.BlankNode) + subject.value
        if isinstance(target, oxigraph.Literal):
            yield _Statement(start, quad.predicate.value, target.value, True, target.language)
        else:
            end = "_:" * isinstance(target, oxigraph.BlankNode) + target.value
            yield _Statement(start, quad.predicate.value, end)


def _with_rdflib(file: IO[bytes], path: Path, kind: str) -> Iterator[_Statement]:
    rdflib: Any = importlib.import_module("rdflib")
    graph = rdflib.Graph(bind_namespaces="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its own plugins
        data = file.read()
        data = data if b"\n" in data else data.replace(b"\r", b"\n")
        graph.parse(data=data, format=LIBRARIES[kind][1], publicID=path.resolve().as_uri())
    for subject, predicate, target in graph:
        start = "_:" * isinstance(subject, rdflib.BNode) + str(subject)
        if isinstance(target, rdflib.Literal):
            yield _Statement(start, str(predicate), str(target), True, target.language)
        else:
            end = "_:" * isinstance(target, rdflib.BNode) + str(target)
            yield _Statement(start, str(predicate), end)


def _recovering(
    file: IO[bytes], parse: Callable[[IO[bytes] | bytes], Iterator[Any]], path: Path, kind: str
) -> Iterator[Any]:
    """All that can be parsed: the parser goes on after a malformed statement.

    It does so after an open quotation only where it ends a line, as in N-Triples: in Turtle and in
    XML the rest would be missing, or half of it.
    """
    problems: list[str] = []
    if kind == "ntriples":
        yield from _line_by_line(file, parse, problems)
    else:
        statements = parse(file)
        while True:
            try:
                yield next(statements)
            except StopIteration:
                break
            except SyntaxError as error:
                problems.append(str(error))
                if kind == "xml" and "IRI" not in str(error):
                    raise
                if "Unexpected end" in str(error) or "Line jumps" in str(error):
                    raise ValueError(
                        f"{problems[0]}. malformed='skip' cannot leave this out, because nothing "
                        "says where the statement ends"
                    ) from error
    if problems:
        number = counted(len(problems), "malformed statement")
        logger.warning("%s: left out %s, the first: %s", path, number, problems[0])


def _line_by_line(
    file: IO[bytes], parse: Callable[[bytes], Iterator[Any]], problems: list[str]
) -> Iterator[Any]:
    """The statements of N-Triples, each on a line of its own."""
    lines = raw_lines(file)
    while chunk := list(itertools.islice(lines, CHUNK)):
        try:  # at once, which takes a third of the time
            yield from list(parse(b"".join(line for _, line in chunk)))
            continue
        except SyntaxError:
            pass
        for number, line in chunk:
            try:
                yield from list(parse(line))
            except SyntaxError as error:
                problems.append(f"line {number:,}: {error.msg.partition(': ')[2]}")
