"""Terms of an ontology in the OBO format."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from hf_adapt.knowledge.graphs.building import build, pairs_of
from hf_adapt.knowledge.graphs.content import Content
from hf_adapt.knowledge.graphs.text_files import Malformed, counted, text_lines
from hf_adapt.knowledge.graphs.triples import read_triples

logger = logging.getLogger(__name__)

QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
ESCAPED = re.compile(r"\\(.)")
SCOPES = ("exact", "narrow", "related", "broad")
SYNONYMS = {"synonym": "", **{f"{scope}_synonym": scope for scope in SCOPES}}  # OBO 1.0 has four
BLANKS = {"n": "\n", "W": " ", "t": "\t"}


@dataclass
class _Term:
    line: int
    key: str = ""
    name: str = ""
    synonyms: list[str] = field(default_factory=list)
    num_broad: int = 0
    alternatives: list[str] = field(default_factory=list)
    definition: str = ""
    edges: list[tuple[str, str]] = field(default_factory=list)
    obsolete: bool = False


def read(path: Path) -> Content:
    """The arrays of an OBO file; see [`KnowledgeGraph.from_obo`]."""
    bad = Malformed(path)
    terms: dict[str, _Term] = {}
    for term in _terms(path, bad):
        if not term.key:
            bad.add(term.line, "expected an id: in this [Term], got none")
        elif (other := terms.setdefault(term.key, term)) is not term:
            bad.add(term.line, f"the id {term.key} was given in line {other.line:,} already")
    bad.raise_if_any("See the OBO format: a line is `tag: value`, and each term has an id.")
    kept = [term for term in terms.values() if not term.obsolete]
    names = {t.key: [t.name, *t.synonyms] if t.name else t.synonyms for t in kept}
    edges = list(_edges(terms, kept))
    _report(path, terms, kept, edges)
    return build(
        read_triples(edges, ("head", "relation", "tail")),
        pairs_of({key: texts for key, texts in names.items() if texts}, "name"),
        pairs_of({t.key: t.definition for t in kept if t.definition}, "description"),
        isolated=pa.array([term.key for term in kept], pa.large_string()),
        source=str(path),
    )


def _edges(terms: dict[str, _Term], kept: list[_Term]) -> Iterator[tuple[str, str, str]]:
    """The triples; an id that was merged into a term stands for it, unless it is a term itself."""
    merged = {other: term.key for term in kept for other in term.alternatives}
    for term in kept:
        for relation, tail in term.edges:
            if tail in terms and not terms[tail].obsolete:
                yield term.key, relation, tail
            elif tail in merged:
                yield term.key, relation, merged[tail]
            elif tail not in terms:
                yield term.key, relation, tail


def _report(
    path: Path, terms: dict[str, _Term], kept: list[_Term], edges: list[tuple[str, str, str]]
) -> None:
    """Log what was left out, and edges to ids that are no terms."""
    if broad := sum(term.num_broad for term in kept):
        number = counted(broad, "broad synonym")
        logger.info("%s: left out %s, broader in meaning than the term.", path, number)
    if unknown := dict.fromkeys(tail for _, _, tail in edges if tail not in terms):
        logger.warning(
            "%s: edges point to %s without a term in it, such as %s. An entity is kept for each, "
            "with the id as its name.",
            path,
            counted(len(unknown), "id"),
            next(iter(unknown)),
        )


def _terms(path: Path, bad: Malformed) -> Iterator[_Term]:
    """The stanzas of terms, one after another."""
    term: _Term | None = None
    for number, line in text_lines(path):
        line = line.strip()
        if not line or line.startswith("!"):
            continue
        if line.startswith("["):
            if term is not None:
                yield term
            term = _Term(number) if line.lower().startswith("[term]") else None
        elif ":" not in line:
            bad.add(number, f"expected `tag: value`, got {line[:60]!r}")
        elif term is not None:
            tag, _, value = line.partition(":")
            if problem := _set(term, tag.strip(), value.strip()):
                bad.add(number, problem)
    if term is not None:
        yield term


def _set(term: _Term, tag: str, value: str) -> str | None:
    """Put what a line says into its term; what is wrong with it, if anything."""
    if tag == "def" or tag in SYNONYMS:
        quoted = QUOTED.match(value)
        if quoted is None:
            return f'expected {tag}: "text" in quotation marks, got {value[:60]!r}'
        text = _plain(quoted[1]).strip()
        if tag == "def":
            term.definition = text
        elif (SYNONYMS[tag] or _scope(value[quoted.end() :])) == "broad":
            term.num_broad += 1
        elif text:
            term.synonyms.append(text)
        return None
    if tag not in ("id", "alt_id", "name", "is_a", "relationship", "is_obsolete"):
        return None
    # ` ! ` begins a comment, `{…}` at the end holds qualifiers; a name may have both in its text.
    words = re.sub(r"\s*\{[^{}]*\}\s*$", "", re.split(r"\s+!\s", value)[0]).split()
    expected = 2 if tag == "relationship" else 1
    if tag == "name":
        term.name = _plain(value).strip()
        return None if term.name else "the name is empty"
    if len(words) < expected:
        return f"expected {tag}: {'relation id' if expected == 2 else 'id'}, got {value[:60]!r}"
    if tag == "id":
        term.key = words[0]
    elif tag == "alt_id":
        term.alternatives.append(words[0])
    elif tag == "is_obsolete":
        term.obsolete = words[0] == "true"
    else:
        term.edges.append(("is_a", words[0]) if tag == "is_a" else (words[0], words[1]))
    return None


def _scope(rest: str) -> str:
    """What follows the text of a synonym first: EXACT, NARROW, RELATED or BROAD."""
    return (rest.split(maxsplit=1) or [""])[0].lower()


def _plain(text: str) -> str:
    return ESCAPED.sub(lambda match: BLANKS.get(match[1], match[1]), text)
