"""RDF and OWL files, parsed by pyoxigraph."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, get_args

import pyarrow as pa

from hf_adapt.knowledge.graphs.builder import build, pairs_from
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

SCHEMA = ("http://schema.org/", "https://schema.org/")

LABELS = (
    f"{RDFS}label",
    f"{SKOS}prefLabel",
    *(f"{schema}name" for schema in SCHEMA),
    "http://xmlns.com/foaf/0.1/name",
)
ALIASES = (
    f"{SKOS}altLabel",
    # Not broad ones: they mean more than the entity.
    *(f"{OBO_IN_OWL}has{scope}Synonym" for scope in ("Exact", "Related", "Narrow")),
    *(f"{schema}alternateName" for schema in SCHEMA),
)
DESCRIPTIONS = (
    f"{SKOS}definition",
    "http://purl.obolibrary.org/obo/IAO_0000115",
    "http://purl.org/dc/terms/description",
    *(f"{schema}description" for schema in SCHEMA),
    f"{RDFS}comment",
)

FORMATS = {"turtle": "TURTLE", "ntriples": "N_TRIPLES", "xml": "RDF_XML"}
ENDINGS = {
    **dict.fromkeys((".ttl", ".turtle"), "turtle"),
    **dict.fromkeys((".nt", ".ntriples"), "ntriples"),
    **dict.fromkeys((".rdf", ".owl", ".xml"), "xml"),
}

Malformity = Literal["error", "skip"]
Parse = Callable[[IO[bytes] | bytes], Iterator[Any]]


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
    quads = _quads(path, format, malformed)
    columns = read_triples(reader.edges(quads), ("head", "relation", "tail"))
    if reader.left_out:
        logger.info("%s: left out %s with blank nodes.", path, counted(reader.left_out, "triple"))
    if old := len(reader.deprecated):
        number = counted(old, "deprecated entity", "deprecated entities")
        logger.info("%s: left out %s.", path, number)
    names, texts = (
        # The more important predicate first; RDF itself has no order.
        sorted(row for row in rows if row[0] not in reader.predicates | reader.deprecated)
        for rows in (reader.names, reader.descriptions)
    )
    first = {entity: text for entity, _, text in reversed(texts)}
    return build(
        without(columns, reader.deprecated),
        pairs_from([row[0] for row in names], [row[2] for row in names], "name", str(path)),
        pairs_from(list(first), list(first.values()), "description", str(path)),
        isolated=pa.array(list(first), pa.large_string()),
        in_order=False,
        source=str(path),
    )


class _Reader:
    """Sorts statements into edges, names and descriptions."""

    def __init__(
        self, language: str | None, names: Sequence[str], descriptions: Sequence[str]
    ) -> None:
        self.language = (language or "").lower().partition("-")[0]
        self.names: list[tuple[str, int, str]] = []
        self.descriptions: list[tuple[str, int, str]] = []
        # One that is both a label and an alias is a label.
        self.texts = {name: (self.descriptions, i) for i, name in enumerate(descriptions)}
        self.texts |= {name: (self.names, i) for i, name in enumerate(dict.fromkeys(names))}
        self.predicates: set[str] = set()  # properties are not entities, though they have labels
        self.deprecated: set[str] = set()
        self.left_out = 0

    def edges(self, quads: Iterator[Any]) -> Iterator[tuple[str, str, str]]:
        """Iterate over the triples between entities; the rest is kept in this object."""
        of_blank: dict[str, dict[str, str]] = defaultdict(dict)
        to_blank: list[tuple[str, str, str]] = []
        for quad in quads:
            subject, predicate, target = str(quad.subject), quad.predicate.value, quad.object
            blank = str(target).startswith("_:")
            if subject.startswith("_:"):
                of_blank[subject][predicate] = "" if blank else target.value
            elif blank:
                to_blank.append((quad.subject.value, predicate, str(target)))
            elif not str(target).startswith("<"):
                self._text(quad.subject.value, predicate, target)
            elif predicate == f"{RDF}type" and target.value.startswith((RDF, RDFS, OWL, SKOS)):
                if target.value.endswith("Property"):
                    self.predicates.add(quad.subject.value)
            else:
                self.predicates.add(predicate)
                yield quad.subject.value, predicate, target.value
        self.left_out = len(to_blank)
        for subject, predicate, node in to_blank:
            about = of_blank[node]
            relation = about.get(f"{OWL}onProperty")
            target = about.get(f"{OWL}someValuesFrom") or about.get(f"{OWL}hasValue")
            is_class = predicate in (f"{RDFS}subClassOf", f"{OWL}equivalentClass")
            if is_class and relation and target:
                self.left_out -= 1
                self.predicates.add(relation)
                yield subject, relation, target

    def _text(self, subject: str, predicate: str, literal: Any) -> None:
        text, tag = literal.value, (literal.language or "").lower().partition("-")[0]
        if predicate == f"{OWL}deprecated" and text.strip().lower() in ("true", "1"):
            self.deprecated.add(subject)
        is_spoken = not self.language or tag in ("", self.language)  # en-GB is English
        if predicate in self.texts and is_spoken and text.strip():
            rows, rank = self.texts[predicate]
            rows.append((subject, rank, text))


def _quads(path: Path, format: str | None, malformed: Malformity) -> Iterator[Any]:
    if malformed not in get_args(Malformity):
        raise ValueError(f"malformed={malformed!r}: expected 'error' or 'skip'.")
    kind, formats = format or ENDINGS.get(kind_of(path)), ", ".join(map(repr, FORMATS))
    if kind not in FORMATS:
        raise ValueError(
            f"{path}: format={format!r} is unknown and the file's ending does not say it. Pass "
            f"format= one of {formats}."
        )
    try:
        oxigraph: Any = importlib.import_module("pyoxigraph")
    except ImportError as error:
        raise ImportError(
            'KnowledgeGraph.from_rdf needs pyoxigraph: pip install "hf-adapt[knowledge]".'
        ) from error
    parse = partial(
        oxigraph.parse,
        format=getattr(oxigraph.RdfFormat, FORMATS[kind]),
        base_iri=path.resolve().as_uri(),
    )
    with open_binary(path) as file:
        try:
            yield from _recovering(file, parse, path, kind) if malformed == "skip" else parse(file)
        except (SyntaxError, ValueError) as error:
            skip = "pass malformed='skip' to leave such statements out, "
            raise ValueError(
                f"{path} cannot be read as {kind}: {error}. Correct the file, "
                f"{skip * (malformed == 'error')}or pass format= one of {formats}."
            ) from error


def _recovering(file: IO[bytes], parse: Parse, path: Path, kind: str) -> Iterator[Any]:
    """All that can be parsed: the parser goes on after a malformed statement.

    It does so after an open quotation only where it ends a line, as in N-Triples: in Turtle and in
    XML the rest would be missing, or half of it.
    """
    problems: list[str] = []
    statements = _line_by_line(file, parse, problems) if kind == "ntriples" else parse(file)
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
                    f"{problems[0]}. malformed='skip' cannot leave this out, because nothing says "
                    "where the statement ends"
                ) from error
    if problems:
        number = counted(len(problems), "malformed statement")
        logger.warning("%s: left out %s, the first: %s", path, number, problems[0])


def _line_by_line(file: IO[bytes], parse: Parse, problems: list[str]) -> Iterator[Any]:
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
