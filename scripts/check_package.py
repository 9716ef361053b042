"""What `make test-package` asks of an installed hf_adapt: imports, the command line, one step.

Usage: python check_package.py HF_ADAPT [EXTRA,EXTRA]
"""

import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hf_adapt

OF_EXTRAS = {
    "attributions": ["captum"],
    "embeddings": ["pykeen"],
    "evaluation": ["evaluate", "sklearn"],
    "knowledge": ["ahocorasick_rs", "networkx", "pyoxigraph"],
    "peft": ["peft"],
    "run": ["jinja2", "matplotlib", "rich", "hf_adapt.report"],
}
"""What each extra installs."""


def check_installed() -> None:
    """The installed files are those that run, and the metadata says the same version."""
    folder = Path(hf_adapt.__file__).parent
    assert "site-packages" in folder.parts, folder
    for name in ("py.typed", "__init__.pyi", "report/page.html", "report/page.css"):
        assert (folder / name).is_file(), name
    metadata = importlib.metadata.metadata("hf-adapt")
    assert metadata["Version"] == hf_adapt.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def check_imports(extras: list[str]) -> None:
    """Every public name, and every module where all extras are there."""
    for name in hf_adapt.__all__:
        getattr(hf_adapt, name)
    families = ("alignment", "continual", "distillation", "evaluation", "knowledge")
    for family in (*families, "multitask", "unfreezing"):
        importlib.import_module(f"hf_adapt.{family}")
    for extra in extras:
        for name in OF_EXTRAS[extra]:
            importlib.import_module(name)
    if extras:
        for module in pkgutil.walk_packages(hf_adapt.__path__, "hf_adapt."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def check_commands(command: str, extras: list[str]) -> None:
    """The command line tells its version and its options."""
    said = subprocess.run([command, "--version"], check=True, capture_output=True, text=True)
    assert hf_adapt.__version__ in said.stdout
    words = [["run"], ["report"], ["schedule"], ["cache-teacher"], ["merge"]]
    for each in words if extras else [[]]:
        subprocess.run([command, *each, "--help"], check=True, capture_output=True)


def check_step() -> None:
    """A tiny model takes one step with the README's callback."""
    size = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=16, num_hidden_layers=1, **size)
    rows = {"input_ids": [[1, 2, 3], [4, 5, 6]] * 2, "labels": [0, 1] * 2}
    source = datasets.Dataset.from_dict(rows)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=1, logging_steps=1, use_cpu=True, report_to="none"
        )
        trainer = Trainer(BertForSequenceClassification(config), args, train_dataset=source)
        target = source.remove_columns("labels")
        trainer.add_callback(hf_adapt.DomainAdversarialCallback(target_dataset=target))
        trainer.train()
        trainer.save_model(folder)
        assert "loss/dann" in trainer.state.log_history[0]
        BertForSequenceClassification.from_pretrained(folder)


if __name__ == "__main__":
    chosen = sys.argv[2].split(",") if len(sys.argv) > 2 else []
    check_installed()
    check_imports(chosen)
    check_commands(sys.argv[1], chosen)
    check_step()
