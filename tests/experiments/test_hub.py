"""Data and a model from the Hub, as a person with a network runs it: here a server of a folder."""

import os
import subprocess
import sys
from pathlib import Path

from tests.experiments.conftest import results, rows, write_csv
from tests.helpers.hub import served
from tests.helpers.word_classifier import save_tiny_model


def test_data_sets_and_a_model_are_taken_from_the_hub(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    for name in ("films", "phones"):
        folder = hub / "datasets" / "people" / name
        folder.mkdir(parents=True)
        write_csv(folder / "train.csv", rows(name.removesuffix("s")))
    model = hub / "models" / "people" / "tiny-bert"
    model.mkdir(parents=True)
    save_tiny_model(model)
    with served(hub) as (address, asked):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "hf_adapt.cli", "run"),
                *("--source", "people/films", "--target", "people/phones"),
                *("--model", "people/tiny-bert", "--method", "recommended", "--seeds", "1"),
                *("--output-dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "true"),
            ],
            env={
                **{
                    k: v
                    for k, v in os.environ.items()
                    if not k.startswith(("HF_", "TRANSFORMERS_"))
                },
                **{"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"},
            },
            timeout=240,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
    assert done.returncode == 0, done.stdout + done.stderr + "\n".join(asked)
    assert {line["error"] for line in results(tmp_path / "out")} == {""}
    taken = [request.rsplit("/", 1)[1] for request in asked if request.startswith("GET")]
    assert taken.count("train.csv") == 2 and taken.count("model.safetensors") == 1
