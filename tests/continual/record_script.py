"""Two trainings that share a record; test_distributed.py starts them in two processes."""

from pathlib import Path

from transformers import Trainer

from hf_adapt import adapt
from hf_adapt.continual import AveragedWeights, ContinualMetrics
from tests.helpers.data import collate, rows
from tests.helpers.distributed import quiet_arguments, save_results
from tests.helpers.models import bert
from tests.helpers.trainers import GradientRecorder


def main(folder: Path, per_device: int, steps: int) -> None:
    """Train both and write the results of this process."""
    model = bert()
    for seed, task in enumerate(("movies", "tweets")):
        trainer = Trainer(
            model,
            quiet_arguments(folder / task, per_device, steps, learning_rate=1e-2),
            train_dataset=rows(40, seed),
            eval_dataset={"movies": rows(7, 1), "tweets": rows(9, 2)},
            data_collator=collate,
            # transformers 5.24 multiplies some heads' eval_loss by the number of processes.
            compute_metrics=lambda p: {"spread": float(p.predictions.std())},
        )
        record = ContinualMetrics(task, metric="spread", path=folder / "record.json")
        adapt(trainer, record, AveragedWeights("soup", start=0.5, every=0.25)).train()
    save_results(folder, trainer, GradientRecorder())
