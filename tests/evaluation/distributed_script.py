"""What evaluations give; test_distributed.py starts it in two processes and in one."""

from pathlib import Path

import torch
from transformers import Trainer

from hf_adapt import adapt
from hf_adapt.evaluation import LabelFreeValidation, WorstGroupAccuracy, layer_distances
from tests.helpers.data import collate, rows
from tests.helpers.distributed import quiet_arguments
from tests.helpers.models import bert, enlarged


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
    speed = ("runtime", "per_second", "preparation_time", "loss")
    kept = {k: torch.tensor(v) for k, v in found.items() if not k.endswith(speed)}
    torch.save(kept, folder / f"rank{args.process_index}.pt")
