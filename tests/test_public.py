"""What `from hf_adapt import …` offers."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hf_adapt

PUBLIC = [
    "DANN",
    "MMD",
    "Adaptation",
    "AdaptationArguments",
    "AdaptationCallback",
    "AdaptationMixin",
    "AdaptationTrainer",
    "Distillation",
    "DistillationArguments",
    "DistillationTrainer",
    "DomainAdversarialCallback",
    "GradualUnfreezingCallback",
    "InformationMaximization",
    "KnowledgeCallback",
    "Objective",
    "Stream",
    "adapt",
]


def test_names_are_pinned_and_documented() -> None:
    assert sorted(hf_adapt.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert (getattr(hf_adapt, name).__doc__ or "").strip(), name


def test_names_are_found_when_they_are_asked_for() -> None:
    found: dict[str, object] = {}
    exec("from hf_adapt import *", found)
    assert set(PUBLIC) <= set(found)
    assert {*PUBLIC, "alignment", "engine", "unfreezing"} <= set(dir(hf_adapt))
    with pytest.raises(ImportError, match="cannot import name 'DAN'"):
        exec("from hf_adapt import DAN")


def test_type_checkers_see_each_name() -> None:
    """A name of a stub is public only if it is imported under its own name explicitly."""
    stub = ast.parse(Path(hf_adapt.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            assert [alias.asname for alias in node.names] == [alias.name for alias in node.names]


@pytest.mark.parametrize(
    "package",
    [
        "alignment",
        "continual",
        "distillation",
        "evaluation",
        "knowledge",
        "multitask",
        "unfreezing",
    ],
)
def test_packages_offer_what_they_say(package: str) -> None:
    module = importlib.import_module(f"hf_adapt.{package}")
    for name in module.__all__:
        assert (getattr(module, name).__doc__ or "").strip(), name


def test_modules_are_attributes() -> None:
    program = (
        "import hf_adapt, hf_adapt.engine\n"
        "hf_adapt.engine.progress.dann_ramp, hf_adapt.distillation.cache"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'progres'"):
        importlib.import_module("hf_adapt.engine").progres  # noqa: B018
