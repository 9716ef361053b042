"""The papers that docstrings refer to, and which names belong to each."""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

ARXIV = re.compile(r"\barXiv:(\d{4}\.\d{4,5})")
SECTION = re.compile(r"^References?:\n((?:    .*\n|\n)+)", re.M)
AUTHORS = re.compile(r"[A-Z][\w-]+(?: & [A-Z][\w-]+| et al\.)? (?:19|20)\d\d\b")
TITLE = re.compile(r'(?: \([^)]*\))?, ("[^"]*")')
SHORT = re.compile(r"\(([A-Z]\w*[A-Z][\w-]*)\)")
VENUE = re.compile(r"\b(?:ACL|ICLR|ICML|JMLR \d+|Machine Learning \d+|NeurIPS|TPAMI \d+)")


class Paper(NamedTuple):
    """A paper, as a docstring cites it: authors and year, and what it says beyond them."""

    authors: str
    title: str
    short: str
    venue: str
    number: str

    @property
    def key(self) -> str:
        """The same for each mention of a paper."""
        return self.number or self.authors

    def __str__(self) -> str:
        named = f"({self.short})" if self.short and self.short not in self.title else ""
        title = f"{self.title} {named}".strip()
        number = f"arXiv:{self.number}" if self.number else ""
        return linked(", ".join(filter(None, (self.authors, title, self.venue, number))))


def linked(text: str) -> str:
    """The text with links to arXiv, in reStructuredText."""
    return ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)


def cited(thing: Any) -> list[Paper]:
    """The papers of a docstring's section Reference, without what deviates from them."""
    section = SECTION.search(f"{inspect.getdoc(thing) or ''}\n")
    text = re.split(r"\bDeviations?:", " ".join(section[1].split()))[0] if section else ""
    starts = [*AUTHORS.finditer(text)]
    ends = [*(each.start() for each in starts[1:]), len(text)]
    papers = []
    for start, end in zip(starts, ends, strict=False):
        about = text[start.end() : end]
        found = (pattern.search(about) for pattern in (SHORT, VENUE, ARXIV))
        short, venue, number = (match[match.re.groups] if match else "" for match in found)
        named = TITLE.match(about)
        papers.append(Paper(start[0], named[1] if named else "", short, venue, number))
    return papers


def page(entries: dict[str, list[Any]], families: dict[str, str]) -> str:
    """The page, in reStructuredText."""
    parts = ["Papers", "======", ""]
    parts += ["Which paper each method is from, as its docstring says it.", ""]
    best: dict[str, Paper] = {}
    for entry in (entry for family in entries.values() for entry in family):
        for paper in cited(entry.object):
            best[paper.key] = max(best.get(paper.key, paper), paper, key=lambda p: len(str(p)))
    for family, title in families.items():
        used: dict[str, list[str]] = {}
        for entry in entries[family]:
            for key in dict.fromkeys(paper.key for paper in cited(entry.object)):
                used.setdefault(key, []).append(f":py:obj:`{entry.name} <{entry.path}>`")
        if used:
            parts += [title, "-" * len(title), "", ".. list-table::"]
            parts += ["   :widths: 65 35", ""]
            for key in sorted(used, key=lambda key: str(best[key])):
                parts += [f"   * - {best[key]}", f"     - {', '.join(used[key])}"]
            parts.append("")
    return "\n".join(parts)
