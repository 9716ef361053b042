"""One process of a distributed run; started by test_distributed.py under torchrun.

Trains the same tiny model on the same rows whatever the number of processes, and writes what must
agree: the model, the discriminator, the gradients and the logs.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_adapt import (
    DANN,
    MMD,
    GradualUnfreezing,
    InformationMaximization,
    RandomLayers,
    adapt,
)
from tests.helpers.data import collate, rows
from tests.helpers.distributed import allow_fsdp_on_cpu, full_state
from tests.helpers.models import bert
from tests.helpers.trainers import GradientRecorder, arguments, weights

UNFREEZING: dict[str, dict[str, Any]] = {
    "gradual": dict(layer_decay=0.5, rewarm_steps=2),  # a transition in each of four steps
    "random": dict(
        schedule=RandomLayers(num_layers=1, every_steps=1, always=["head", "embeddings"])
    ),
    "cached": dict(until="layer.1", cache_frozen_prefix=True),
}


def main(folder: Path, setting: str, per_device: int, steps: int) -> None:
    """Train and write the results of this process.

    Args:
        folder: Where to write.
        setting: Options as `key=value`, separated by commas.
        per_device: Rows per process in a micro-batch.
        steps: Micro-batches per optimizer step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(item.split("=") for item in setting.split(",") if item)
    head = options.get("head", "sequence")
    if "fsdp" in options:
        allow_fsdp_on_cpu()
    fsdp: dict[str, Any] = (
        dict(fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]})
        if "fsdp" in options
        else {}
    )
    args = arguments(
        folder / "out",
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=steps,
        max_steps=int(options.get("max_steps", 4)),
        max_grad_norm=0.5,
        save_strategy="steps",
        save_steps=2,
        **({"gradient_checkpointing": True} if "checkpointing" in options else {}),
        optim="adamw_torch",
        adam_epsilon=1e-3,  # Adam turns rounding of tiny gradients into whole steps
        **fsdp,
    )
    recorder = GradientRecorder()
    source = rows(40, 1, "token" if head == "token" else "row")
    trainer = Trainer(
        bert(head),
        args,
        train_dataset=source.to_iterable_dataset() if "stream" in options else source,
        # accelerate cuts a stream's batches for each process out of one: all must be as long.
        data_collator=partial(collate, length=10 if "stream" in options else None),
        callbacks=[] if fsdp else [recorder],
    )
    assert trainer.is_fsdp_enabled == bool(fsdp)
    dann = DANN(ramp=None, hidden_sizes=(8,))
    objectives = [dann, InformationMaximization(weight=0.3, diversity_weight=0.0)]
    if "mmd" in options:
        objectives = [dann, MMD()]
    unfreezing = UNFREEZING.get(options.get("unfreezing", ""))
    if unfreezing is not None:
        objectives.append(GradualUnfreezing(**unfreezing))
    adapt(trainer, *objectives, target_dataset=rows(23, 2, None, low=20))
    trainer.train(resume_from_checkpoint=options.get("resume"))
    trainer.save_model(str(folder / "final"))
    state = {f"model.{k}": v for k, v in full_state(trainer).items()}
    state.update({f"dann.{k}": v for k, v in weights(dann.module).items()})
    if recorder.gradients:
        state["gradient"] = recorder.gradients[0]
    torch.save(state, folder / f"rank{args.process_index}.pt")
    if args.process_index == 0:
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    for job in sys.argv[2:]:
        name, setting, per_device, steps = job.split(":")
        main(Path(sys.argv[1]) / name, setting, int(per_device), int(steps))
    torch.distributed.barrier()  # none leaves while another still talks
    torch.distributed.destroy_process_group()
