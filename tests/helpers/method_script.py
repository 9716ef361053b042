"""A run with one method of the table; test_matrix.py starts it in two processes and in one."""

from pathlib import Path

from tests.helpers.distributed import quiet_arguments, save_results
from tests.helpers.methods import METHODS, make_trainer
from tests.helpers.trainers import GradientRecorder, weights


def main(folder: Path, per_device: int, steps: int, method: str) -> None:
    """Train and write the results of this process.

    Args:
        folder: Where to write.
        per_device: Rows per process in a micro-batch.
        steps: Micro-batches per optimizer step.
        method: One of `METHODS`.
    """
    recorder, adaptations = GradientRecorder(), METHODS[method].make()
    args = quiet_arguments(folder, per_device, steps)
    trainer = make_trainer(folder, adaptations, args=args, callbacks=[recorder])
    trainer.train()
    modules = {
        f"{adaptation.name}.{name}": value
        for adaptation in adaptations
        if adaptation.module is not None
        for name, value in weights(adaptation.module).items()  # type: ignore[arg-type]
    }
    save_results(folder, trainer, recorder, **modules)
