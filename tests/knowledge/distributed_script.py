"""One process of a distributed run with knowledge; started by test_distributed.py."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_adapt import DANN, adapt
from hf_adapt.knowledge import EntityPrediction, KnowledgeInjection, KnowledgeInjector
from tests.helpers import toy
from tests.helpers.distributed import allow_fsdp_on_cpu, full_state
from tests.helpers.models import family
from tests.helpers.trainers import GradientRecorder, arguments

LABELS = {"bert_tokens": "token", "llama": "lm", "t5": "lm"}


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
    name = options.get("model", "bert")
    labels = LABELS.get(name, "row")
    fsdp: dict[str, Any] = {}
    if "fsdp" in options:
        allow_fsdp_on_cpu()
        layers = [options["fsdp"]]
        fsdp = dict(fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": layers})
    recorder = GradientRecorder()
    trainer = Trainer(
        family(name),
        arguments(
            folder / "out",
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=steps,
            max_steps=4,
            max_grad_norm=0.5,
            optim="adamw_torch",
            adam_epsilon=1e-3,  # Adam turns rounding of tiny gradients into whole steps
            seed=1,
            gradient_checkpointing="checkpointed" in options,
            **fsdp,
        ),
        train_dataset=toy.rows(24, 1, labels),
        eval_dataset=toy.rows(13, 2, labels),
        data_collator=toy.collator(labels),
        processing_class=toy.tokenizer(),
        callbacks=[] if fsdp else [recorder],
    )
    injector = KnowledgeInjector(
        ["embeddings", 0], options.get("form", "cross_attention"), num_neighbours=2
    )
    own = KnowledgeInjection(toy.graph(), toy.vectors(), injector=injector, learning_rate=1e-2)
    more: list[Any] = []
    if "predicts" in options:
        more.append(EntityPrediction(own, mask_rate=0.5, num_negatives=4))
    target: dict[str, Any] = {}
    if "dann" in options:
        more.append(DANN(hidden_sizes=(8,), dropout=0.0))
        target["target_dataset"] = toy.rows(12, 7).remove_columns("labels")
    adapt(trainer, own, *more, **target)
    assert trainer.is_fsdp_enabled == bool(fsdp)
    trainer.train()
    state = {f"model.{k}": v for k, v in full_state(trainer).items()}
    assert own.module is not None
    state |= {f"injector.{k}": v for k, v in own.module.state_dict().items()}
    if not fsdp:
        state["gradient"] = recorder.gradients[0]
        predicted: Any = trainer.predict(trainer.eval_dataset).predictions
        predicted = predicted[0] if isinstance(predicted, tuple) else predicted
        # Padded to another length where the batches are others.
        state["predicted"] = torch.from_numpy(predicted).flatten(1)[:, :2]
    torch.save(state, folder / f"rank{trainer.args.process_index}.pt")


if __name__ == "__main__":
    for job in sys.argv[2:]:
        name, setting, per_device, steps = job.split(":")
        main(Path(sys.argv[1]) / name, setting, int(per_device), int(steps))
    torch.distributed.barrier()  # none leaves while another still talks
    torch.distributed.destroy_process_group()
