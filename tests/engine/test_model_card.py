"""A model card says which adaptations ran, and nothing that is not so."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import Trainer

from hf_adapt import DANN, AdaptationCallback, InformationMaximization, Objective
from hf_adapt.continual import Consolidation, Replay
from hf_adapt.engine.model_card import TITLE
from hf_adapt.engine.papers import cited
from hf_adapt.evaluation import LabelFreeValidation
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments


def trained(folder: Path, *adaptations: Any, target: Any = None) -> Trainer:
    callback = AdaptationCallback(*adaptations, target_dataset=target)
    trainer = Trainer(
        bert(), arguments(folder), train_dataset=rows(24, 1), eval_dataset=rows(8, 2),
        data_collator=collate, callbacks=[callback] if adaptations else [],
    )  # fmt: skip
    trainer.train()
    return trainer


def test_it_says_what_ran(tmp_path: Path) -> None:
    target = rows(13, 3, None, low=20)
    validation = LabelFreeValidation(target, validators=["entropy"])
    old = Replay(rows(9, 4), ratio=0.5)
    trainer = trained(tmp_path, DANN(weight=0.5), old, validation, target=target)
    trainer.evaluate()
    trainer.create_model_card()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    (plain, section) = card.text.split(TITLE)
    assert "learning_rate: 0.001" in plain
    assert "`DANN(weight=0.5)`" in section and "`Replay(ratio=0.5)`" in section
    assert "24 for training, 13 of the stream `target` without labels, 1 beside each" in section
    assert "9 of the stream `replay` with their labels, 0.5 beside each" in section
    assert "3 steps" in section
    assert "title = {Domain-Adversarial Training of Neural Networks}" in section
    assert section.count("@misc{ganin2016") == 1


def test_without_adaptations_it_is_the_trainers(tmp_path: Path) -> None:
    trained(tmp_path).create_model_card()
    assert TITLE not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "cls, expected",
    [
        (DANN, ["1505.07818"]),
        (InformationMaximization, [None, "2002.08546"]),
        (Consolidation, ["1802.01483", "1612.00796", "1711.05101"]),
        (Replay, [None, "1902.10486"]),
        (Objective, []),
    ],
)
def test_each_paper_has_its_own_number(cls: type, expected: list[str | None]) -> None:
    """Not that of the next one in the docstring."""
    found = [paper.bibtex for paper in cited(cls)]
    assert len(found) == len(expected)
    for entry, number in zip(found, expected, strict=True):
        assert ("eprint" not in entry) if number is None else f"eprint = {{{number}}}" in entry
