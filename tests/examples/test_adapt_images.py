"""The example of images, run as a person runs it: a few digits, no network."""

from pathlib import Path

import adapt_images
import datasets
import domain_data
import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageClassification


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two domains of 24 random images."""

    def write_domain(name: str) -> Path:
        random = np.random.default_rng(len(name))
        images = [Image.fromarray(random.integers(0, 255, (16, 16), np.uint8)) for _ in range(24)]
        rows = {"image": images, "label": [str(i % 10) for i in range(24)]}
        path = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
        return path

    monkeypatch.setattr(adapt_images, "write_domain", write_domain)
    monkeypatch.setenv("HF_ADAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.usefixtures("digits")
def test_both_models_are_tested_and_the_adapted_one_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--max_steps": "2", "--num_train": "16", "--num_test": "8", "--use_cpu": "true"}
    options["--output_dir"] = str(tmp_path / "out")
    adapt_images.main([part for option in options.items() for part in option])
    printed = capsys.readouterr().out
    assert "without:" in printed and "with MCC:" in printed
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 10
    assert domain_data.cache_folder().is_relative_to(tmp_path)
