"""The pages that are made from the source: the API reference, the papers and the messages.

They are written before Sphinx reads its sources, and docstrings are turned into what Sphinx reads:
[`Name`] becomes a link, and one that leads nowhere is a warning (an error in `make docs`).
"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import sys
import textwrap
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import messages
import papers
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from transformers import Trainer

import hf_adapt

logger = logging.getLogger(__name__)

FAMILIES = {
    "hf_adapt.alignment": "Domain adaptation",
    "hf_adapt.alignment.priors": "Class frequencies",
    "hf_adapt.distillation": "Distillation",
    "hf_adapt.unfreezing": "Gradual unfreezing",
    "hf_adapt.knowledge": "Knowledge graphs",
    "hf_adapt.continual": "Learning on",
    "hf_adapt.multitask": "Several tasks",
    "hf_adapt.evaluation": "Evaluation",
    "hf_adapt.evaluation.validators": "Validators",
    "hf_adapt.report": "Reports",
    "hf_adapt": "The Trainer and its adaptations",
    "hf_adapt.engine": "Writing a method",
}
# Modules that export nothing. The names of the engine are for those who write a method.
NAMES = {
    "hf_adapt.alignment.priors": ("Priors", "SampledPriors"),
    "hf_adapt.engine": (
        "adaptation.Term",
        "progress.Schedule",
        "progress.dann_ramp",
        "progress.linear_ramp",
        "progress.slanted_triangular",
        "batch.Batch",
        "batch.Rows",
        "callback.collect_items",
        "item_outputs.ItemOutputs",
        "item_outputs.OutputCollector",
        "mixins.BatchTransform",
        "mixins.EvaluationObserver",
        "mixins.EvaluationView",
        "mixins.FusedLoss",
        "mixins.FusedObjective",
        "mixins.GradientTransform",
        "mixins.LearningRateControl",
        "mixins.LossCombiner",
        "mixins.RowRouting",
        "mixins.WeightAverage",
        "mixins.WeightTransform",
    ),
}


METHODS = (property, cached_property, classmethod, staticmethod)


class Entry(NamedTuple):
    """A public name: where it is documented, and what it is."""

    path: str
    object: Any

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.object) or "").partition("\n\n")[0].replace("\n", " ")

    @property
    def kind(self) -> str:
        if inspect.isclass(self.object):
            return "class"
        return "function" if inspect.isroutine(self.object) else "data"

    @property
    def members(self) -> list[str]:
        """Public methods that are not a base class's; those are documented there."""
        bases = self.object.__mro__[1:] if ".engine." not in self.object.__module__ else ()
        if issubclass(self.object, hf_adapt.AdaptationMixin):
            bases = (*bases, Trainer)
        return [
            name
            for name, member in vars(self.object).items()
            if not name.startswith("_")
            and (callable(member) or isinstance(member, METHODS))
            and inspect.getdoc(getattr(self.object, name))
            and not any(name in vars(base) for base in bases)
        ]


def identity(thing: Any) -> Any:
    """The same for an object whatever it is imported from."""
    return (getattr(thing, "__module__", None), getattr(thing, "__qualname__", id(thing)))


@cache
def entries() -> dict[str, list[Entry]]:
    """The public names of each family, each in one family alone."""
    seen: set[Any] = set()
    found: dict[str, list[Entry]] = {}
    for family in FAMILIES:
        module = importlib.import_module(family)
        names = NAMES.get(family) or getattr(module, "__all__", None) or _defined(module)
        found[family] = []
        for name in names:
            path = f"{family}.{name}"
            parent, _, last = path.rpartition(".")
            thing = getattr(importlib.import_module(parent), last)
            if not isinstance(thing, ModuleType) and identity(thing) not in seen:
                seen.add(identity(thing))
                found[family].append(Entry(path, thing))
    return found


def _defined(module: ModuleType) -> list[str]:
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]


@cache
def documented() -> dict[Any, str]:
    """The path of each public object and of its public members."""
    paths = {}
    for entry in (entry for family in entries().values() for entry in family):
        paths[identity(entry.object)] = entry.path
        if entry.kind == "class":
            for name in entry.members:
                paths.setdefault(identity(getattr(entry.object, name)), f"{entry.path}.{name}")
    return paths


def find(name: str, near: Any, path: str) -> str | None:
    """The documented path of `name` as the docstring of `near`, documented at `path`, means it."""
    family = max((f for f in FAMILIES if path.startswith(f)), key=len)
    owner = next(
        (e.object for f in entries().values() for e in f if path.startswith(f"{e.path}.")), None
    )
    defined_in = sys.modules.get(getattr(near, "__module__", ""))
    for start in (near, owner, defined_in, importlib.import_module(family)):
        thing = start
        for part in name.split("."):
            thing = getattr(thing, part, None)
        if thing is not None and identity(thing) in documented():
            return documented()[identity(thing)]
    if name in FAMILIES:
        return name
    everywhere = {p for p in documented().values() if p == name or p.endswith(f".{name}")}
    if len(everywhere) > 1:
        everywhere = {p for p in everywhere if p.startswith(f"{family}.")}
    if not everywhere and name.count(".") > 1:  # the module that defines it
        parent, _, last = name.rpartition(".")
        try:
            return documented().get(identity(getattr(importlib.import_module(parent), last, None)))
        except ModuleNotFoundError:
            return None
    return everywhere.pop() if len(everywhere) == 1 else None


ALIAS = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
SPAN = re.compile(r"``.+?``|`[^`]+`", re.S)
LINK = re.compile(r"\[`([^`\]]+)`\](?:\[([\w.]+)\])?")


def docstring(
    app: Sphinx, what: str, path: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Turn a docstring's Markdown into what Sphinx reads."""

    def link(match: re.Match[str]) -> str:
        name = match[2] or match[1]
        target = find(name, thing, path)
        if target is None:
            logger.warning("docstring of %s: [`%s`] is no public name", path, name)
            return f"``{match[1]}``"
        role = "mod" if target in FAMILIES else "obj"
        return rf":py:{role}:`{match[1]} <{target}>`\ "

    def parted(match: re.Match[str]) -> str:
        """Code, set apart from what it may not touch: the s of `Stream`s."""
        before = match.string[: match.start()][-1:]
        after = match.string[match.end() :][:1]
        first = "" if before.isspace() or before in "\"'([{<-/:" else r"\ "
        return first + match[0] + ("" if after.isspace() or after in "\"')]}>-/:.,;!?" else r"\ ")

    parts = re.split(r"^( *)```(\w*)\n(.*?)^ *```$", "\n".join(lines), flags=re.M | re.S)
    text = papers.linked(LINK.sub(link, SPAN.sub(parted, parts[0])))
    for indent, language, code, after in zip(*(iter(parts[1:]),) * 4, strict=True):
        text += f"{indent}.. code-block:: {language or 'text'}\n\n{textwrap.indent(code, '    ')}"
        text += papers.linked(LINK.sub(link, SPAN.sub(parted, after)))
    lines[:] = text.split("\n")


def link_to(path: str) -> str:
    """A link to a documented name, in reStructuredText."""
    return f":py:obj:`{path.rpartition('.')[2]} <{path}>`"


def page(family: str, title: str) -> str:
    """The page of a family, in reStructuredText."""
    heading = f"{family}: {title[0].lower()}{title[1:]}"
    parts = [heading, "=" * len(heading), "", f".. automodule:: {family}", ""]
    if family == "hf_adapt":  # most of whose names are those of other families
        names = [documented()[identity(getattr(hf_adapt, name))] for name in hf_adapt.__all__]
        others = ", ".join(link_to(path) for path in names if path.count(".") > 1)
        parts += [f"Also imported from here: {others}.", ""]
    for kind, heading in (("class", "Classes"), ("function", "Functions"), ("data", "Data")):
        found = [entry for entry in entries()[family] if entry.kind == kind]
        if not found:
            continue
        parts += [heading, "-" * len(heading), "", ".. list-table::", "   :widths: auto", ""]
        for entry in found:
            summary = LINK.sub(r"`\1`", entry.summary)
            parts += [f"   * - {link_to(entry.path)}", f"     - {summary}"]
        parts.append("")
        for entry in found:
            parts.append(f".. auto{kind}:: {entry.path}")
            if kind == "class" and entry.members:
                parts.append(f"   :members: {', '.join(entry.members)}")
            parts.append("")
    return "\n".join(parts)


def signature(app: Sphinx, what: str, path: str, thing: Any, *shown: Any) -> tuple[Any, Any]:
    """A signature with the names of type aliases, not what they stand for."""
    _, arguments, returned = shown
    return tuple(text and ALIAS.sub(r"\1", text) for text in (arguments, returned))


def dashes(app: Sphinx, tree: nodes.document) -> None:
    """Put a dash between a parameter and what it is; Sphinx writes two hyphens."""
    for text in list(tree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def inside(text: str) -> str:
    """Markdown whose links to the rest of the repository lead to pages of the site, or nowhere."""

    def replaced(match: re.Match[str]) -> str:
        label, path, anchor = match[1], match[2], match[3] or ""
        if path == "benchmarks/README.md":
            return f"[{label}](/reference/benchmarks.md{anchor})"
        return label if "`" in label else f"{label} (`{path}`)"

    return OUTSIDE.sub(replaced, text)


def page_read(app: Sphinx, name: str, source: list[str]) -> None:
    """Mend the links of a page of docs/."""
    source[0] = inside(source[0])


def repository_page(path: Path) -> str:
    """A page of the repository, as one of docs/reference."""
    return re.sub(r"\]\((?:\.\./)?docs/", "](/", path.read_text("utf-8"))


def generate(app: Sphinx) -> None:
    """Write the pages, where they have changed."""
    if "__new__" in vars(
        hf_adapt.Adaptation
    ):  # or every adaptation would be shown with its signature
        del hf_adapt.Adaptation.__new__
    folder = Path(app.srcdir, "reference")
    root = Path(app.srcdir).parent
    pages = {f"{family}.rst": page(family, title) for family, title in FAMILIES.items()}
    pages["papers.rst"] = papers.page(entries(), FAMILIES)
    pages |= {
        f"messages_{name}.rst": text
        for name, text in messages.pages(Path(hf_adapt.__file__).parent, find)
    }
    pages["benchmarks.md"] = repository_page(root / "benchmarks/README.md")
    pages["changelog.md"] = repository_page(root / "CHANGELOG.md")
    folder.mkdir(exist_ok=True)
    for old in set(folder.iterdir()) - {folder / name for name in pages}:
        old.unlink()
    for name, text in pages.items():
        file = folder / name
        if not file.exists() or file.read_text("utf-8") != text:
            file.write_text(text, "utf-8")


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax into the site."""
    if error is None and app.builder.format == "html":
        shutil.copy(app.config.mathjax_file, Path(app.outdir, "_static", app.config.mathjax_path))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.add_config_value("mathjax_file", None, "")
    app.connect("builder-inited", generate)
    app.connect("source-read", page_read)
    app.connect("autodoc-process-docstring", docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", signature)
    app.connect("doctree-read", dashes)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
