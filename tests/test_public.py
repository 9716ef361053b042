"""What `from hf_adapt import …` offers."""

import importlib
import subprocess
import sys

import pytest

import hf_adapt


def test_names_are_there_and_documented() -> None:
    assert len(set(hf_adapt.__all__)) == len(hf_adapt.__all__)
    for name in hf_adapt.__all__:
        assert (getattr(hf_adapt, name).__doc__ or "").strip(), name


def test_names_are_found_when_they_are_asked_for() -> None:
    found: dict[str, object] = {}
    exec("from hf_adapt import *", found)
    assert set(hf_adapt.__all__) <= set(found)
    assert set(hf_adapt.__all__) == {n for names in hf_adapt._NAMES.values() for n in names.split()}
    assert set(hf_adapt.__all__) <= set(dir(hf_adapt))
    with pytest.raises(ImportError, match="cannot import name 'DAN'"):
        exec("from hf_adapt import DAN")


@pytest.mark.parametrize(
    "package", ["alignment", "distillation", "evaluation", "knowledge", "unfreezing"]
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
