"""Invented runs on disk, as `hf-adapt run` leaves them, and the page about runs as a tree."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_adapt.engine.item_outputs import ItemOutputs
from hf_adapt.experiments.outputs import RunOutputs

ROWS = 60


def items(
    seed: int, classes: int, shift: float, skill: float, labelled: bool = True
) -> ItemOutputs:
    """Features around a point of each class; the higher `skill`, the more logits are right."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(ROWS) % classes)
    truth = np.eye(classes)[labels]
    features = np.pad(truth, ((0, 0), (0, 3))) + 0.3 * rng.normal(size=(ROWS, classes + 3)) + shift
    logits = skill * truth + rng.normal(size=(ROWS, classes))
    given = labels if labelled else np.full(ROWS, -100)
    return ItemOutputs(
        torch.tensor(features, dtype=torch.float32),
        torch.tensor(logits, dtype=torch.float32),
        torch.tensor(given),
        torch.arange(ROWS),
    )


def save_run(
    root: Path,
    method: str = "source only",
    seed: int = 42,
    *,
    pair: tuple[str, str] = ("films", "phones"),
    classes: tuple[str, ...] = ("neg", "pos"),
    skill: float = 2.0,
    poisoned: bool = False,
    labelled: bool = True,
    collapsed: bool = False,
    digest: str = "0123456789",
    folders: tuple[str, str] | None = None,
    **result: Any,
) -> Path:
    """Write one run: result.json, outputs.npz and logs.json.

    Args:
        root: The experiment's output folder.
        method: The name of the method.
        seed: Of the run.
        pair: Source and target.
        classes: Their names.
        skill: How good the model is.
        poisoned: Whether the labels of the target's test rows are replaced by wrong ones.
        labelled: Whether the target has labels to test on.
        collapsed: Whether the model gives every target row the first class.
        digest: The end of the folder's name.
        folders: Names of the folders of the pair and the run, if not made of the others.
        result: Further keys of result.json.
    """
    count, start = len(classes), 10 * seed + len(method)
    sides = {
        "source_dev": items(start, count, 0.0, 3.0),
        "source_test": items(start + 1, count, 0.0, 3.0),
        "target_unlabelled": items(start + 2, count, 0.5, skill, labelled=False),
        "target_test": items(start + 3, count, 0.5, skill) if labelled else None,
    }
    if collapsed:
        logits = torch.nn.functional.one_hot(torch.zeros(ROWS, dtype=torch.long), count).float()
        sides["target_unlabelled"] = replaced(sides["target_unlabelled"], logits=logits)
    if poisoned:
        assert sides["target_test"] is not None
        wrong = (sides["target_test"].labels + 1 + torch.arange(ROWS) % 2) % count
        sides["target_test"] = replaced(sides["target_test"], labels=wrong)
    found: dict[str, Any] = {"source": pair[0], "target": pair[1], "method": method, "seed": seed}
    found |= {"seconds": 10.0, "peak_memory_mb": None, "source_accuracy": 0.9, "source_f1": 0.9}
    test = sides["target_test"]
    guess = (test or sides["target_unlabelled"]).logits.argmax(1)  # type: ignore[union-attr]
    found["target_predicted_shares"] = shares(guess, classes)
    if test is not None:
        found["target_true_shares"] = shares(test.labels, classes)
        found["target_accuracy"] = found["target_f1"] = float((guess == test.labels).float().mean())
    found |= {"warnings": 0, "first_warning": None, **result}
    names = folders or ("-".join(pair), f"{method.replace(' ', '_')}-seed{seed}-{digest}")
    folder = root.joinpath(*names)
    RunOutputs(**sides).save(folder)
    (folder / "result.json").write_text(json.dumps(found))
    logs = [
        {"loss": 1 / step, "loss/task": 0.5, "learning_rate": 1e-4, "step": step, "epoch": step / 9}
        for step in range(1, 4)
    ]
    logs.append({"eval_target_iwv": float("-inf"), "step": 3, "train_runtime": 3.0})
    (folder / "logs.json").write_text(json.dumps(logs))
    return folder


def replaced(items: ItemOutputs | None, **columns: torch.Tensor) -> ItemOutputs:
    return ItemOutputs(**{**vars(items), **columns})


def shares(numbers: torch.Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    counts = torch.bincount(numbers, minlength=len(classes)) / len(numbers)
    return dict(zip(classes, counts.tolist(), strict=True))


def save_extras(folder: Path, text: str = "", **choice: Any) -> None:
    """Write diagnostics of a run, and a choice beside it."""
    diagnostics = {
        "layers": [{"name": f"layer {n}{text}", "a_distance": n / 2, "mmd": 0.1} for n in range(3)],
        "groups": {
            f"short{text}": {"accuracy": 0.7, "low": 0.6, "high": 0.8, "count": 40},
            f"long{text}": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "count": 20},
        },
    }
    (folder / "diagnostics.json").write_text(json.dumps(diagnostics))
    given = {
        "chosen": "DANN",
        "baseline": "source only",
        "reason": f"It has the best mean rank.{text}",
        "candidates": [
            {"name": "source only", "kept": True, "reason": "rank 2 of 2", "scores": {"iwv": -0.5}},
            {"name": "DANN", "kept": True, "reason": "rank 1 of 2", "scores": {"iwv": -0.25}},
            {"name": "MCC", "kept": False, "reason": f"dropped: it has collapsed{text}"},
        ],
    }
    (folder.parent / "choice.json").write_text(json.dumps([{"seed": 42, **given, **choice}]))


# ---------------------------------------------------------------- their page
def page_of(path: Path) -> ET.Element:
    """The page; it is well-formed XML, too."""
    return ET.fromstring(path.read_text(encoding="utf-8"))


def words(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def without_oracle(element: ET.Element) -> ET.Element:
    for parent in list(element.iter()):
        for child in [child for child in parent if "data-oracle" in child.attrib]:
            parent.remove(child)
    return element
