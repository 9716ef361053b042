"""What the site reads from the source: papers of docstrings, and messages."""

import ast
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(autouse=True)
def extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(DOCS / "_extensions"), *sys.path])


def test_papers_of_a_docstring() -> None:
    import papers

    class Method:
        """Does something.

        Reference:
            Long & Wang 2015, "Title of 2014; with a subtitle" (TWS), Eq. 3, arXiv:1502.02791;
            unbalanced: Ben-David et al. 2006, NeurIPS. The form is that of Brier 1950.
            Deviation: unlike Nobody et al. 1999, arXiv:9999.99999.
        """

    found = papers.cited(Method)
    assert [tuple(paper) for paper in found] == [
        ("Long & Wang 2015", '"Title of 2014; with a subtitle"', "TWS", "", "1502.02791"),
        ("Ben-David et al. 2006", "", "", "NeurIPS", ""),
        ("Brier 1950", "", "", "", ""),
    ]
    assert papers.shown(found[0]).endswith(
        "(TWS), `arXiv:1502.02791 <https://arxiv.org/abs/1502.02791>`__"
    )
    assert papers.cited(Path) == []


def test_messages_of_a_module() -> None:
    import messages

    source = """
class Method:
    def setup(self, weight):
        raise ValueError(f"weight={weight!r} of {type(self).__name__}, {len(weight)}: pass a_b.")
        raise NotImplementedError("nobody meets this one")

def run():
    logger.warning("Of %d rows " + "%s are empty.", 3, 2)
    raise error
"""
    assert list(messages.found(ast.parse(source))) == [
        ("ValueError", r"weight=\ *weight*\  of Method, …: pass a\_b.", "Method"),
        ("warning", "Of … rows … are empty.", "run"),
    ]


def test_each_page_is_in_the_menu() -> None:
    menu = (DOCS / "index.md").read_text("utf-8")
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert [page for page in pages if not re.search(rf"^({page}|.* <{page}>)$", menu, re.M)] == []
