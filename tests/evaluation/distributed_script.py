"""What evaluations give; test_distributed.py starts it in two processes and in one."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_adapt import adapt
from hf_adapt.engine.callback import collect_items
from hf_adapt.evaluation import LabelFreeValidation, WorstGroupAccuracy, layer_distances
from tests.helpers.data import collate, rows
from tests.helpers.distributed import quiet_arguments
from tests.helpers.models import bert, enlarged

module: Any = sys.modules["hf_adapt.evaluation.train_and_choose"]


def choice(folder: Path, args: Any, source: Any, target: Any) -> dict[str, float]:
    """What `train_and_choose` finds of a model that is trained for a step; the last rank is late.

    Every rank has to wait for the others, whether or not it finds the first one's files already.
    """

    def late(*given: Any, **options: Any) -> Any:
        items = collect_items(*given, **options)
        time.sleep(0.3 * args.process_index)
        return items

    module.collect_items = late  # type: ignore[attr-defined]
    args = replace(args, output_dir=str(folder / "chosen"), max_steps=1)

    def make_trainer() -> Trainer:
        return Trainer(
            enlarged(bert(), 5),
            args,
            train_dataset=source.remove_columns("place"),
            eval_dataset=source.remove_columns("place"),
            data_collator=collate,
        )

    few = target.select(range(5)).add_column("labels", [0, 1, 2, 0, 1])
    chosen = module.train_and_choose(make_trainer, target, {}, labelled_target=few)
    asked = replace(chosen, choice=replace(chosen.choice, to_label=range(0, 40, 3)))
    rows_asked = {f"asked {n}": float(row) for n, row in enumerate(asked.to_label)}
    assert len(rows_asked) == 14
    return {**chosen.choice.candidates[0].scores, **rows_asked}


def main(folder: Path, per_device: int, steps: int, head: str = "sequence") -> None:
    """Evaluate, and write the metrics of this process.

    Args:
        folder: Where to write.
        per_device: Rows per process in a batch.
        steps: Has no effect: nothing is trained.
        head: What the model classifies: a "sequence" or each "token".
    """
    args = quiet_arguments(folder, per_device, steps, per_device_eval_batch_size=per_device)
    source = rows(45, 1, "token" if head == "token" else "row")
    source = source.add_column("place", [("north", "south", "west")[i % 3] for i in range(45)])
    target = rows(43, 2, None, low=20)
    trainer = Trainer(
        enlarged(bert(head), 5),
        args,
        eval_dataset=source,
        data_collator=collate,
    )
    adapt(
        trainer,
        WorstGroupAccuracy(groups="place"),
        LabelFreeValidation(validators=("entropy", "snd", "circular")),
        target_dataset=target,
    )
    found = trainer.evaluate()
    for layer in layer_distances(trainer, source, target):
        found[f"{layer.name}/a_distance"], found[f"{layer.name}/mmd"] = layer.a_distance, layer.mmd
    if head == "sequence":
        found |= choice(folder, args, source, target)
    speed = ("runtime", "per_second", "preparation_time", "loss")
    kept = {k: torch.tensor(v) for k, v in found.items() if not k.endswith(speed)}
    torch.save(kept, folder / f"rank{args.process_index}.pt")
