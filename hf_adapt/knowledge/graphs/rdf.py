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

from hf_adapt.knowledge.graphs.building import Pairs, build, pairs_from
from hf_adapt.knowledge.graphs.content import Content
from hf_adapt.knowledge.graphs.text_files import counted, kind_of, open_binary, raw_lines
from hf_adapt.knowledge.graphs.triples import read_triples, without
from hf_adapt.knowledge.strings import CHUNK

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

FORMATS = {
    ".ttl": "turtle",
    ".turtle": "turtle",
    ".nt": "ntriples",
    ".ntriples": "ntriples",
    ".rdf": "xml",
    ".owl": "xml",
    ".xml": "xml",
}
OXIGRAPH_FORMATS = {"turtle": "TURTLE", "ntriples": "N_TRIPLES", "xml": "RDF_XML"}
RDFLIB_FORMATS = {"turtle": "turtle", "ntriples": "nt", "xml": "xml"}


Malformity = Literal["error", "skip"]


class _Statement(NamedTuple):
    """One triple of RDF; what it points to is an IRI, a blank node, or a text with its language."""

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
    """The arrays of an RDF file; see [`KnowledgeGraph.from_rdf`]."""
    labels, aliases, descriptions = predicates
    named = dict.fromkeys([*labels, *aliases])  # one that is in both is a label
    rank = {predicate: i for i, predicate in enumerate(named)}
    described = {predicate: i for i, predicate in enumerate(descriptions)}
    reader = _Reader(language, rank, described)
    statements = _statements(path, format, malformed)
    columns = read_triples(reader.edges(statements), ("head", "relation", "tail"))
    columns = without(columns, reader.deprecated)
    if reader.left_out:
        number = counted(reader.left_out, "triple")
        logger.info("%s: left out %s with blank nodes.", path, number)
    if reader.deprecated:
        number = counted(len(reader.deprecated), "deprecated entity", "deprecated entities")
        logger.info("%s: left out %s.", path, number)
    unnamed = reader.predicates | reader.deprecated
    return build(
        columns,
        _pairs(reader.names, unnamed, "name", path),
        _pairs(reader.descriptions, unnamed, "description", path, one=True),
        isolated=pa.array(sorted(reader.described() - unnamed), pa.large_string()),
        in_order=False,
        source=str(path),
    )


class _Reader:
    """Sorts statements into edges, names and descriptions."""

    def __init__(
        self, language: str | None, rank: dict[str, int], described: dict[str, int]
    ) -> None:
        self.language, self.rank, self.text_rank = language, rank, described
        self.names: list[tuple[str, int, str]] = []
        self.descriptions: list[tuple[str, int, str]] = []
        self.predicates: set[str] = set()  # properties are not entities, though they have labels
        self.deprecated: set[str] = set()
        self.left_out = 0

    def described(self) -> set[str]:
        """The entities with a description, which are kept though in no triple."""
        return {entity for entity, _, _ in self.descriptions}

    def edges(self, statements: Iterator[_Statement]) -> Iterator[tuple[str, str, str]]:
        """The triples between entities; the rest is kept in this object."""
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
        used = 0
        for subject, predicate, blank, *_ in to_blank:
            about = of_blank[blank]
            relation = about.get(f"{OWL}onProperty", "_:")
            target = about.get(f"{OWL}someValuesFrom") or about.get(f"{OWL}hasValue") or "_:"
            is_class = predicate in (f"{RDFS}subClassOf", f"{OWL}equivalentClass")
            if is_class and not relation.startswith("_:") and not target.startswith("_:"):
                used += 1
                self.predicates.add(relation)
                yield subject, relation, target
        self.left_out = len(to_blank) - used

    def _text(self, statement: _Statement) -> None:
        subject, predicate, text, _, tag = statement
        if predicate == f"{OWL}deprecated" and text.strip().lower() in ("true", "1"):
            self.deprecated.add(subject)
        spoken = (tag or "").lower().partition("-")[0]  # en-GB is English
        wanted = (self.language or "").lower().partition("-")[0]
        if not text.strip() or (self.language and tag and spoken != wanted):
            return
        if predicate in self.rank:
            self.names.append((subject, self.rank[predicate], text))
        elif predicate in self.text_rank:
            self.descriptions.append((subject, self.text_rank[predicate], text))


def _pairs(
    rows: list[tuple[str, int, str]],
    left_out: set[str],
    what: str,
    path: Path,
    one: bool = False,
) -> Pairs | None:
    """Rows of (entity, text), the more important predicate first; RDF itself has no order."""
    rows = sorted(row for row in rows if row[0] not in left_out)
    if one:
        rows = list({entity: (entity, i, text) for entity, i, text in reversed(rows)}.values())
    if not rows:
        return None
    entities = pa.array([row[0] for row in rows], pa.large_string())
    texts = pa.array([row[2] for row in rows], pa.large_string())
    return pairs_from(entities, texts, what, str(path))


def _statements(path: Path, format: str | None, malformed: Malformity) -> Iterator[_Statement]:
    if malformed not in get_args(Malformity):
        raise ValueError(f"malformed={malformed!r}: expected 'error' or 'skip'.")
    kind = format or FORMATS.get(kind_of(path))
    if kind not in OXIGRAPH_FORMATS:
        raise ValueError(
            f"{path}: format={format!r} is unknown and the file's ending does not say it. Pass "
            f"format= one of {', '.join(map(repr, OXIGRAPH_FORMATS))}."
        )
    if importlib.util.find_spec("pyoxigraph") is not None:
        parse: Any = partial(_with_pyoxigraph, malformed=malformed)
    elif malformed == "skip":
        raise ImportError(
            "malformed='skip' needs pyoxigraph: pip install pyoxigraph. rdflib stops at the first "
            "malformed statement."
        )
    elif importlib.util.find_spec("rdflib") is not None:
        parse = _with_rdflib
    else:
        raise ImportError(
            "KnowledgeGraph.from_rdf needs pyoxigraph (fast) or rdflib: "
            'pip install "hf-adapt[knowledge]".'
        )
    with open_binary(path) as file:
        try:
            yield from parse(file, path, kind)
        except (OSError, EOFError, zlib.error):  # of the file, not of what it says
            raise
        except Exception as error:  # each parser of rdflib has errors of its own kind
            skip = "pass malformed='skip' to leave such statements out (with pyoxigraph), "
            raise ValueError(
                f"{path} cannot be read as {kind}: {error}. Correct the file, "
                f"{skip if malformed == 'error' else ''}or pass format= one of "
                f"{', '.join(map(repr, OXIGRAPH_FORMATS))}."
            ) from error


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


def _with_pyoxigraph(
    file: IO[bytes], path: Path, kind: str, malformed: Malformity
) -> Iterator[_Statement]:
    oxigraph: Any = importlib.import_module("pyoxigraph")
    parse = partial(
        oxigraph.parse,
        format=getattr(oxigraph.RdfFormat, OXIGRAPH_FORMATS[kind]),
        base_iri=path.resolve().as_uri(),
    )
    for quad in _recovering(file, parse, path, kind) if malformed == "skip" else parse(file):
        subject, predicate, target = quad.subject, quad.predicate.value, quad.object
        start = f"_:{subject.value}" if isinstance(subject, oxigraph.BlankNode) else None
        if isinstance(target, oxigraph.Literal):
            yield _Statement(start or subject.value, predicate, target.value, True, target.language)
        else:
            end = "_:" if isinstance(target, oxigraph.BlankNode) else ""
            yield _Statement(start or subject.value, predicate, end + target.value)


def _with_rdflib(file: IO[bytes], path: Path, kind: str) -> Iterator[_Statement]:
    rdflib: Any = importlib.import_module("rdflib")
    graph = rdflib.Graph(bind_namespaces="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its own plugins
        data = file.read()
        data = data if b"\n" in data else data.replace(b"\r", b"\n")
        graph.parse(data=data, format=RDFLIB_FORMATS[kind], publicID=path.resolve().as_uri())
    for subject, predicate, target in graph:
        start = f"_:{subject}" if isinstance(subject, rdflib.BNode) else str(subject)
        if isinstance(target, rdflib.Literal):
            yield _Statement(start, str(predicate), str(target), True, target.language)
        else:
            end = "_:" if isinstance(target, rdflib.BNode) else ""
            yield _Statement(start, str(predicate), end + str(target))
