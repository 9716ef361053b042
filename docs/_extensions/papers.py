"""The page of the papers that docstrings refer to, and which names belong to each."""

from __future__ import annotations

from typing import Any

from hf_adapt.engine.papers import ARXIV, Paper, cited


def key_of(paper: Paper) -> str:
    """The same for each mention of a paper."""
    return paper.number or paper.authors


def shown(paper: Paper) -> str:
    """A paper in reStructuredText."""
    named = f"({paper.short})" if paper.short and paper.short not in paper.title else ""
    title = f"{paper.title} {named}".strip()
    number = f"arXiv:{paper.number}" if paper.number else ""
    return linked(", ".join(filter(None, (paper.authors, title, paper.venue, number))))


def linked(text: str) -> str:
    """The text with links to arXiv, in reStructuredText."""
    return ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)


def page(entries: dict[str, list[Any]], families: dict[str, str]) -> str:
    """The page, in reStructuredText."""
    parts = ["Papers", "======", ""]
    parts += ["Which paper each method is from, as its docstring says it.", ""]
    best: dict[str, Paper] = {}
    for entry in (entry for family in entries.values() for entry in family):
        for paper in cited(entry.object):
            key = key_of(paper)
            best[key] = max(best.get(key, paper), paper, key=lambda each: len(shown(each)))
    for family, title in families.items():
        used: dict[str, list[str]] = {}
        for entry in entries[family]:
            for key in dict.fromkeys(map(key_of, cited(entry.object))):
                used.setdefault(key, []).append(f":py:obj:`{entry.name} <{entry.path}>`")
        if used:
            parts += [title, "-" * len(title), "", ".. list-table::"]
            parts += ["   :widths: 65 35", ""]
            for key in sorted(used, key=lambda key: shown(best[key])):
                parts += [f"   * - {shown(best[key])}", f"     - {', '.join(used[key])}"]
            parts.append("")
    return "\n".join(parts)
