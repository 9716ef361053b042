"""What a target without objectives gets, by all three ways in."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_adapt import AdaptationCallback, AdaptationTrainer, adapt
from hf_adapt.alignment import recommended
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments


@pytest.mark.parametrize("way", ["callback", "adapt", "class"])
def test_a_target_alone_gets_the_recommended_recipe(way: str, tmp_path: Path, caplog: Any) -> None:
    target: dict[str, Any] = {"target_dataset": rows(9, 2, None), "target_priors": [0.5, 0.3, 0.2]}
    script = {"train_dataset": rows(12, 1), "data_collator": collate}
    if way == "class":
        trainer: Trainer = AdaptationTrainer(bert(), arguments(tmp_path), **script, **target)
    else:
        trainer = Trainer(bert(), arguments(tmp_path), **script)
        if way == "callback":
            trainer.add_callback(AdaptationCallback(**target))
        else:
            adapt(trainer, **target)
    trainer.train()
    names = [each.name for each in recommended()]
    assert names and all(f"loss/{name}" in trainer.state.log_history[0] for name in names)
    (record,) = [r for r in caplog.records if "without objectives" in r.message]
    assert "SelfTraining" in record.message and "target_priors=" in record.message


def test_a_callback_without_anything_says_so(caplog: Any) -> None:
    AdaptationCallback()
    assert "AdaptationCallback was given neither an adaptation nor a target" in caplog.text
    with pytest.raises(TypeError, match=r"got the text 'DANN'\. Make one of its class"):
        AdaptationCallback("DANN")  # type: ignore[arg-type]
