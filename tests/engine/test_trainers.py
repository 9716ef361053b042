"""What the author set up stays: steps, epochs, order and batch size are the plain Trainer's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import pytest
from transformers import (
    Trainer,
)

from hf_adapt import (
    DomainAdversarialCallback,
)
from hf_adapt.engine.streams import Stream
from tests.helpers.adaptation import SOURCE, TARGET, RecordingCollator, length_grouping
from tests.helpers.libraries import BATCH
from tests.helpers.models import bert
from tests.helpers.trainers import arguments


@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"dataloader_drop_last": True},
        {"remove_unused_columns": False},
        length_grouping(),
    ],
    ids=lambda settings: next(iter(settings), "default"),
)
def test_source_rows_steps_and_epochs_are_the_plain_trainers(
    settings: dict[str, Any], ratio: float, tmp_path: Any
) -> None:
    seen = []
    for adapted in (False, True):
        collator = RecordingCollator()
        trainer = Trainer(
            model=bert(),
            args=arguments(tmp_path, max_steps=-1, num_train_epochs=2, **settings),
            train_dataset=SOURCE,
            data_collator=collator,
        )
        if adapted:
            trainer.add_callback(DomainAdversarialCallback(Stream(TARGET, ratio=ratio)))
        result = trainer.train()
        state = trainer.state
        assert state.train_batch_size == BATCH
        seen.append((collator.sources(), state.global_step, state.max_steps, state.epoch))
        epochs = [entry["epoch"] for entry in state.log_history]
        seen[-1] += (epochs, result.metrics["epoch"])
        if adapted:
            rows_seen = sum(map(len, collator.sources()))
            if "dataloader_drop_last" not in settings:
                assert sum(map(len, collator.targets())) == 2 * int(13 * ratio)
                assert rows_seen == 26
                # The second epoch goes on where the first one ended in the target.
                drawn = Counter(row for batch in collator.targets() for row in batch)
                assert len(drawn) == len(TARGET)
                assert max(drawn.values()) - min(drawn.values()) <= 1
        else:
            assert not any(collator.targets())
    assert seen[0] == seen[1]


def test_length_grouping_reads_the_source(tmp_path: Any) -> None:
    """The longest row of the source comes first, whatever the target's lengths."""
    long = datasets.Dataset.from_list([{**TARGET[0], "input_ids": [40] * 60}] * 9)
    long = long.map(lambda row: {"attention_mask": [1] * 60})
    collator = RecordingCollator()
    args = arguments(tmp_path, **length_grouping())
    trainer = Trainer(model=bert(), args=args, train_dataset=SOURCE, data_collator=collator)
    trainer.add_callback(DomainAdversarialCallback(long))
    trainer.train()
    first = collator.sources()[0]
    assert len(first[0]) == max(len(row["input_ids"]) for row in SOURCE)
