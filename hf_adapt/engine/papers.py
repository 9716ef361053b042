"""The papers that docstrings refer to."""

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
    def bibtex(self) -> str:
        """An entry of BibTeX with what is known."""
        names, year = self.authors.rsplit(" ", 1)
        names = names.replace(" et al.", " and others").replace(" & ", " and ")
        fields = {"author": names, "title": self.title.strip('"'), "year": year}
        if self.number:
            fields |= {"eprint": self.number, "archivePrefix": "arXiv"}
        body = ", ".join(f"{key} = {{{value}}}" for key, value in fields.items() if value)
        return f"@misc{{{re.sub('[^a-z]', '', names.split()[0].lower())}{year}, {body}}}"


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
