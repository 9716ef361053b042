"""A run with knowledge; injection/test_distributed.py starts it in two processes and in one."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_adapt import DANN, adapt
from hf_adapt.knowledge import EntityPrediction, KnowledgeInjection, KnowledgeInjector
from tests.helpers import toy
from tests.helpers.distributed import quiet_arguments, save_results
from tests.helpers.models import family
from tests.helpers.trainers import GradientRecorder

LABELS = {"bert_tokens": "token", "llama": "lm", "t5": "lm"}


def main(
    folder: Path,
    per_device: int,
    steps: int,
    model: str = "bert",
    form: str = "cross_attention",
    fsdp: str | None = None,
    beside_others: bool = False,
    **settings: Any,
) -> None:
    """Train and write the results of this process.

    Args:
        folder: Where to write.
        per_device: Rows per process in a micro-batch.
        steps: Micro-batches per optimizer step.
        model: The family of the model.
        form: How the knowledge is injected.
        fsdp: The layers to shard.
        beside_others: Predict masked entities and adapt to a target, too.
        settings: Further training arguments.
    """
    labels = LABELS.get(model, "row")
    recorder = GradientRecorder()
    trainer = Trainer(
        family(model),
        quiet_arguments(folder, per_device, steps, fsdp, seed=1, **settings),
        train_dataset=toy.rows(24, 1, labels),
        eval_dataset=toy.rows(13, 2, labels),
        data_collator=toy.collator(labels),
        processing_class=toy.tokenizer(),
        callbacks=[] if fsdp else [recorder],
    )
    injector = KnowledgeInjector(["embeddings", 0], form, num_neighbours=2)
    own = KnowledgeInjection(toy.graph(), toy.vectors(), injector=injector, learning_rate=1e-2)
    more: list[Any] = []
    target: dict[str, Any] = {}
    if beside_others:
        more.append(EntityPrediction(own, mask_rate=0.5, num_negatives=4))
        more.append(DANN(hidden_sizes=(8,), dropout=0.0))
        target["target_dataset"] = toy.rows(12, 7).remove_columns("labels")
    adapt(trainer, own, *more, **target)
    assert trainer.is_fsdp_enabled == bool(fsdp)
    trainer.train()
    assert own.module is not None
    state = {f"injector.{k}": v for k, v in own.module.state_dict().items()}
    if not fsdp:
        predicted: Any = trainer.predict(trainer.eval_dataset).predictions
        predicted = predicted[0] if isinstance(predicted, tuple) else predicted
        # Padded to another length where the batches are others.
        state["predicted"] = torch.from_numpy(predicted).flatten(1)[:, :2]
    save_results(folder, trainer, recorder, **state)
