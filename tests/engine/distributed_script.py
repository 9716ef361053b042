"""A run with domain adaptation; test_distributed.py starts it in two processes and in one.

Trains the same tiny model on the same rows whatever the number of processes, and writes what must
agree: the model, the discriminator, the gradients and the logs.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_adapt import DANN, MMD, InformationMaximization, Objective, Stream, adapt
from hf_adapt.unfreezing import GradualUnfreezing, RandomLayers
from tests.helpers.data import collate, rows
from tests.helpers.distributed import quiet_arguments, save_results
from tests.helpers.models import bert
from tests.helpers.trainers import GradientRecorder, weights

UNFREEZING: dict[str, dict[str, Any]] = {
    "gradual": dict(layer_decay=0.5, rewarm_steps=2),  # a transition in each of four steps
    "random": dict(
        schedule=RandomLayers(num_layers=1, every_steps=1, always=["head", "embeddings"])
    ),
    "cached": dict(until="layer.1", cache_frozen_prefix=True),
}


class Further(Objective):
    """The size of the predictions of a further forward of the memory's rows."""

    streams = ("memory",)

    def num_items(self, rows: Any) -> torch.Tensor:
        return (rows.domain > 0).sum()

    def loss(self, batch: Any) -> Any:
        further = batch.forward(streams=("memory",))
        features, domain = further.features()
        sizes = features.square().mean(-1) if len(domain) else features.flatten()
        return sizes.sum(), (batch.domain > 0).sum()


def main(
    folder: Path,
    per_device: int,
    steps: int,
    head: str = "sequence",
    fsdp: str | None = None,
    resume: str | None = None,
    mmd: bool = False,
    streamed: bool = False,
    unfreezing: str | None = None,
    memory: str | None = None,
    **settings: Any,
) -> None:
    """Train and write the results of this process.

    Args:
        folder: Where to write.
        per_device: Rows per process in a micro-batch.
        steps: Micro-batches per optimizer step.
        head: What the model classifies: a "sequence" or each "token".
        fsdp: The layers to shard.
        resume: The run beside this one whose second checkpoint is resumed.
        mmd: Add MMD, which couples the rows of a batch.
        streamed: Read the rows from a stream.
        unfreezing: One of `UNFREEZING`.
        memory: Add a stream of a row for every fourth one, "labelled" or "hidden", with a forward
            of its own and a further one.
        settings: Further training arguments.
    """
    args = quiet_arguments(
        folder, per_device, steps, fsdp, save_strategy="steps", save_steps=2, **settings
    )
    recorder = GradientRecorder()
    source = rows(40, 1, "token" if head == "token" else "row")
    trainer = Trainer(
        bert(head),
        args,
        train_dataset=source.to_iterable_dataset() if streamed else source,
        # accelerate cuts a stream's batches for each process out of one: all must be as long.
        data_collator=partial(collate, length=10 if streamed else None),
        callbacks=[] if fsdp else [recorder],
    )
    assert trainer.is_fsdp_enabled == bool(fsdp)
    dann = DANN(ramp=None, hidden_sizes=(8,))
    objectives = [dann, InformationMaximization(weight=0.3, diversity_weight=0.0)]
    if mmd:
        objectives = [dann, MMD()]
    if unfreezing is not None:
        objectives.append(GradualUnfreezing(**UNFREEZING[unfreezing]))
    streams = {}
    if memory is not None:
        objectives.append(Further())
        labels = "keep" if memory == "labelled" else "hide"
        data = rows(9, 4, "token" if head == "token" else "row")
        streams["memory"] = Stream(data, ratio=0.25, labels=labels, forward="separate")
    adapt(trainer, *objectives, target_dataset=rows(23, 2, None, low=20), streams=streams)
    trainer.train(
        resume_from_checkpoint=resume and str(folder.parent / resume / "out" / "checkpoint-2")
    )
    trainer.save_model(str(folder / "final"))
    discriminator = {f"dann.{k}": v for k, v in weights(dann.module).items()}
    save_results(folder, trainer, recorder, **discriminator)
