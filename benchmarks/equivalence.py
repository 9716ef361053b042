"""Whether a change of the code changed what training does, to the last bit.

Trains a dozen small settings and writes a digest of every gradient, log entry, checkpoint and final
weight to a JSON file. Run it before and after a change, on the same machine, and compare:

    python benchmarks/equivalence.py before.json
    python benchmarks/equivalence.py after.json --against before.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import hf_adapt
from hf_adapt.alignment import DANN, MMD, InformationMaximization
from hf_adapt.distillation import Distillation, DistillationTrainer, HiddenStates
from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.unfreezing import LPFT, GradualUnfreezing

try:
    from hf_adapt.engine.streams import Stream
except ImportError:  # before there were streams
    Stream = None  # type: ignore[assignment, misc]

BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    num_labels=3,
)
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
STEPS = 6


def digest(value: Any) -> str:
    """A short hash of tensors, numbers and containers of them."""
    found = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.update(
                item.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                found.update(str(key).encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            for each in item:
                add(each)
        else:
            found.update(repr(item).encode())

    add(value)
    return found.hexdigest()[:16]


class Gradients(TrainerCallback):
    """Digests of all gradients at each optimizer step, after clipping."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradients of this step."""
        named = kwargs["model"].named_parameters()
        self.seen.append(digest({n: p.grad for n, p in named if p.grad is not None}))


def rows(count: int, seed: int, kind: str = "rows", labelled: bool = True) -> datasets.Dataset:
    """Token ids of several lengths, with labels of rows or of tokens."""
    made = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(count):
        length = int(torch.randint(4, 12, (), generator=made))
        ids = torch.randint(5, 40, (length,), generator=made).tolist()
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * length}
        if labelled and kind == "rows":
            row["labels"] = sum(ids) % 3
        elif labelled:
            row["labels"] = [i % 3 for i in ids] if kind == "tokens" else ids
        data.append(row)
    return datasets.Dataset.from_list(data)


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    width = max(len(row["input_ids"]) for row in batch)
    made: dict[str, torch.Tensor] = {}
    for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        if key not in batch[0]:
            continue
        if isinstance(batch[0][key], int):
            made[key] = torch.tensor([row[key] for row in batch])
        else:
            made[key] = torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in batch])
    return made


def target(dataset: Any, **options: Any) -> dict[str, Any]:
    """The arguments that name a target, in this version of the library."""
    if Stream is not None:
        return {"target_dataset": Stream(dataset, **options) if options else dataset}
    return {"target_dataset": dataset, **{f"target_{k}": v for k, v in options.items()}}


def model(kind: str) -> Any:
    """A tiny model with random weights."""
    set_seed(0)
    if kind == "lm":
        return AutoModelForCausalLM.from_config(GPT2)
    auto = AutoModelForTokenClassification if kind == "tokens" else None
    return (auto or AutoModelForSequenceClassification).from_config(BERT)


def settings() -> dict[str, Callable[[str], Trainer]]:
    """The runs, by name: functions of an output folder."""

    def trainer(
        folder: str,
        *adaptations: Any,
        kind: str = "rows",
        cls: type[Trainer] = Trainer,
        given: dict[str, Any] | None = None,
        train: Any = None,
        options: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Trainer:
        settings: dict[str, Any] = {
            "per_device_train_batch_size": 4,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "learning_rate": 5e-3,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **arguments,
        }
        callbacks = [AdaptationCallback(*adaptations, **(given or {}))] if adaptations else []
        return cls(
            model=model(kind),
            args=TrainingArguments(folder, **settings),
            data_collator=collate,
            train_dataset=rows(40, 1, kind) if train is None else train,
            eval_dataset=rows(8, 3, kind),
            callbacks=callbacks,
            **(options or {}),
        )

    def unlabelled(kind: str = "rows") -> datasets.Dataset:
        return rows(25, 2, kind, labelled=False)

    def teacher(kind: str) -> Any:
        made = model(kind)
        torch.manual_seed(5)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return made

    return {
        "plain": lambda f: trainer(f),
        "dann": lambda f: trainer(f, DANN(), given=target(unlabelled())),
        "mmd + im, two targets, ratio 2": lambda f: trainer(
            f,
            MMD(),
            InformationMaximization(),
            given=target([unlabelled(), rows(9, 7, labelled=False)], ratio=2.0),
        ),
        "mmd, separate, accumulation": lambda f: trainer(
            f,
            MMD(),
            given=target(unlabelled(), forward="separate"),
            gradient_accumulation_steps=3,
        ),
        "dann, tokens, accumulation": lambda f: trainer(
            f,
            DANN(weight=0.3),
            kind="tokens",
            given=target(unlabelled("tokens")),
            gradient_accumulation_steps=2,
        ),
        "im, lm, streams": lambda f: trainer(
            f,
            MMD(),
            kind="lm",
            train=rows(40, 1, "lm").to_iterable_dataset(),
            given=target(unlabelled("lm").to_iterable_dataset()),
        ),
        "dann, bfloat16": lambda f: trainer(f, DANN(), given=target(unlabelled()), bf16=True),
        "gradual + mmd": lambda f: trainer(
            f, GradualUnfreezing(), MMD(), given=target(unlabelled())
        ),
        "lp-ft": lambda f: trainer(f, GradualUnfreezing(LPFT()), gradient_accumulation_steps=2),
        "distillation + features": lambda f: trainer(
            f,
            cls=DistillationTrainer,
            options={
                "teacher": teacher("rows"),
                "features": [HiddenStates()],
                "evaluate_distillation": True,
            },
        ),
        "distillation, lm, accumulation": lambda f: trainer(
            f, Distillation(teacher("lm")), kind="lm", gradient_accumulation_steps=2
        ),
        "distillation, whole logits, target": lambda f: trainer(
            f,
            Distillation([teacher("tokens"), teacher("tokens")], ce_weight=1.0),
            MMD(weight=0.1),
            kind="tokens",
            given=target(unlabelled("tokens")),
        ),
    }


def checkpoints(folder: Path) -> dict[str, str]:
    """Digests of what the checkpoints hold, by file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = digest(load_file(path))
        elif path.name in ("optimizer.pt", "scheduler.pt", "adaptation_optimizer.pt"):
            found[name] = digest(torch.load(path, weights_only=True))
    return found


def result(make: Callable[[str], Trainer]) -> dict[str, Any]:
    """Digests of one setting: trained in one go, and resumed half-way."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        found: dict[str, Any] = {}
        for name, folder, resume in (("run", one, None), ("resumed", two, f"{one}/checkpoint-3")):
            trainer, seen = make(folder), Gradients()
            trainer.add_callback(seen)
            trainer.train(resume_from_checkpoint=resume)
            logs = [
                {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}
                for entry in trainer.state.log_history
            ]
            found[name] = {
                "gradients": seen.seen,
                "logs": {
                    "names": sorted({k for entry in logs for k in entry}),
                    "all": digest(logs),
                },
                "checkpoints": checkpoints(Path(folder)),
                "weights": digest(dict(trainer.model.state_dict())),
            }
        return found


def main() -> None:
    """Run all settings and write, or compare, their digests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path, help="a file that an earlier run wrote")
    parser.add_argument("--only", help="run the settings whose names hold this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, make in settings().items():
        if options.only and options.only not in name:
            continue
        found[name] = result(make)
        print(f"{name}: {digest(found[name])}", flush=True)
    options.output.write_text(
        json.dumps({"version": hf_adapt.__version__, "runs": found}, indent=1)
    )
    if options.against:
        before = json.loads(options.against.read_text())["runs"]
        differs = False
        for name, runs in found.items():
            for run, parts in runs.items():
                for part, value in parts.items():
                    if before.get(name, {}).get(run, {}).get(part) != value:
                        differs = True
                        print(f"DIFFERS: {name} / {run} / {part}")
        print("different" if differs else f"{len(found)} settings: the same to the last bit")
        sys.exit(differs)


if __name__ == "__main__":
    main()
