"""What `from hf_adapt import …` offers."""

import importlib

import pytest

import hf_adapt


def test_names_are_there_and_documented() -> None:
    assert len(set(hf_adapt.__all__)) == len(hf_adapt.__all__)
    for name in hf_adapt.__all__:
        assert (getattr(hf_adapt, name).__doc__ or "").strip(), name


@pytest.mark.parametrize(
    "package", ["alignment", "distillation", "evaluation", "knowledge", "unfreezing"]
)
def test_packages_offer_what_they_say(package: str) -> None:
    module = importlib.import_module(f"hf_adapt.{package}")
    for name in module.__all__:
        assert (getattr(module, name).__doc__ or "").strip(), name
