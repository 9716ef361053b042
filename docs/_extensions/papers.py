"""The papers that docstrings refer to, and which names belong to each."""

from __future__ import annotations

import inspect
import re
from typing import Any

ARXIV = re.compile(r"\barXiv:(\d{4}\.\d{4,5})")
SECTION = re.compile(r"^References?:\n((?:    .*\n|\n)+)", re.M)
YEAR = re.compile(r"\b(?:19|20)\d\d\b")


def linked(text: str) -> str:
    """The text with links to arXiv, in reStructuredText."""
    return ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)


def cited(thing: Any) -> list[str]:
    """The papers of a docstring's section Reference, without what deviates from them."""
    match = SECTION.search(f"{inspect.getdoc(thing) or ''}\n")
    if match is None:
        return []
    text = re.split(r"\bDeviations?:", " ".join(match[1].split()))[0]
    quoted = re.sub(r'"[^"]*"', lambda title: title[0].replace(";", "\0"), text)
    parts = (part.replace("\0", ";").strip(" .") for part in quoted.split(";"))
    return [part for part in parts if YEAR.search(part)]


def key(paper: str) -> str:
    """The same for each mention of a paper: its number, or its authors and year."""
    number = ARXIV.search(paper)
    return number[1] if number else paper[: YEAR.search(paper).end()]  # type: ignore[union-attr]


def shown(paper: str) -> str:
    """A paper without the place in it."""
    paper = re.sub(r"^[a-z][\w' -]*: ", "", paper)  # "unbalanced: Fatras et al."
    paper = re.sub(
        r",? (?:Eq\.|Alg\.|Algorithm|[Ss]ections?|Table|Definition|Claim) [^,()\"]*", "", paper
    )
    paper = re.sub(r",? (?:by|with) \[`.*|\[`|`\]|\[hf_adapt[\w.]*\]", "", paper)
    return linked(re.sub(r": ``.*", "", paper)).replace("__(", "__ (")


def page(entries: dict[str, list[Any]], families: dict[str, str]) -> str:
    """The page, in reStructuredText."""
    parts = ["Papers", "======", ""]
    parts += ["Which paper each method is from, as its docstring says it.", ""]
    best: dict[str, str] = {}
    for entry in (entry for family in entries.values() for entry in family):
        for paper in cited(entry.object):
            best[key(paper)] = max(best.get(key(paper), ""), paper, key=_told)
    for family, title in families.items():
        used: dict[str, list[str]] = {}
        for entry in entries[family]:
            for paper in dict.fromkeys(map(key, cited(entry.object))):
                used.setdefault(paper, []).append(f":py:obj:`{entry.name} <{entry.path}>`")
        if used:
            parts += [title, "-" * len(title), "", ".. list-table::"]
            parts += ["   :widths: 65 35", ""]
            for paper in sorted(used, key=lambda paper: shown(best[paper])):
                parts += [f"   * - {shown(best[paper])}", f"     - {', '.join(used[paper])}"]
            parts.append("")
    return "\n".join(parts)


def _told(paper: str) -> tuple[bool, int]:
    """How much a mention says: its title counts most."""
    return '"' in paper, len(shown(paper))
