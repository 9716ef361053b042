"""A table of the methods that change training; what each must hold is tested by its rows.

A new method is one more row of `METHODS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from datasets import concatenate_datasets
from transformers import Trainer, TrainerCallback

from hf_adapt import Adaptation, adapt
from hf_adapt.alignment import (
    ADDA,
    AFN,
    ATDOC,
    BNM,
    CDAN,
    CMD,
    CORAL,
    DANN,
    FGM,
    JMMD,
    MCC,
    MCD,
    MDD,
    MMD,
    PADA,
    SAM,
    SHOT,
    VAT,
    AaD,
    DeepJDOT,
    EntropyMinimization,
    ImportanceWeighting,
    InformationMaximization,
    PriorCorrection,
    RDrop,
    SelfTraining,
    SupervisedContrastive,
    TargetLanguageModeling,
)
from hf_adapt.continual import (
    AGEM,
    SI,
    AveragedWeights,
    Consolidation,
    DarkReplay,
    Fisher,
    KeepPredictions,
    Replay,
    ReplayMemory,
)
from hf_adapt.continual.row_choice import LOGITS
from hf_adapt.multitask import (
    FAMO,
    GradNorm,
    MultiTask,
    SoftSharing,
    TaskSpec,
    Uncertainty,
    mix,
    pcgrad,
)
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.toy import tokenizer
from tests.helpers.trainers import arguments, weights


@dataclass(frozen=True)
class Method:
    """A method, with settings for tiny models and a constant weight.

    Attributes:
        make: Makes its adaptations, new for each run.
        accumulation: What several micro-batches of an optimizer step are: `"rows"`: one large
            micro-batch, as the term is a sum over rows; `"batches"`: the mean of their terms, as
            the term couples rows; None: neither can be compared, as it draws random numbers or
            remembers its micro-batches, and its own tests show it.
        refuses_checkpointing: What it says of gradient checkpointing, if it cannot work with it.
        refuses_tokens: What it says where a head classifies tokens, if it cannot work there.
        keeps: How the names of the weights begin that it does not train.
        corrects: The weights that it changes when training has ended, after the last checkpoint.
        refuses_adapters: What it says of LoRA, if it cannot work with it.
        for_tokens: Makes its adaptations for a head that classifies tokens, if they are others.
        uses_target: Whether it trains with target rows.
        files: What it writes beside a saved model, besides the engine's own files.
    """

    make: Callable[[], list[Adaptation]]
    accumulation: Literal["rows", "batches"] | None
    refuses_tokens: str | None = None
    refuses_checkpointing: str | None = None
    keeps: tuple[str, ...] = ()
    corrects: tuple[str, ...] = ()
    refuses_adapters: str | None = None
    for_tokens: Callable[[], list[Adaptation]] | None = None
    uses_target: bool = True
    files: tuple[str, ...] = ()


PRIORS = (0.5, 0.3, 0.2)


def masked(inputs: dict[str, Any]) -> dict[str, Any]:
    """A view in which every third token is another one."""
    tokens = inputs["input_ids"].clone()
    tokens[:, 1::3] = 3
    return {**inputs, "input_ids": tokens}


def old(labels: str = "row") -> datasets.Dataset:
    """Rows of an earlier task."""
    return rows(17, 4, labels, low=30)


def old_with_logits(labels: str = "row") -> datasets.Dataset:
    """The same with what a model once predicted."""
    generator = torch.Generator().manual_seed(5)
    return old(labels).add_column(LOGITS, torch.randn(17, 3, generator=generator).tolist())


def mixed(labels: str = "row") -> Any:
    """40 rows of three tasks, the first with the labels of `rows`."""
    tagged = [
        {"tags" if k == "labels" else k: v for k, v in row.items()} for row in rows(14, 7, "token")
    ]
    spam = [{**row, "labels": row["labels"] % 2} for row in rows(12, 8, "row", low=30)]
    spam = tagged[:12] if labels == "token" else spam
    return mix({"own": rows(14, 1, labels), "tags": tagged, "spam": spam})


def tasks(labels: str = "row", **options: Any) -> MultiTask:
    """Those of `mixed`."""
    tagged = TaskSpec("tags", 4, head="token_classification", collator=collate)
    spam = TaskSpec(num_labels=2) if labels == "row" else tagged
    return MultiTask({"own": TaskSpec(), "tags": tagged, "spam": spam}, **options)


METHODS = {
    "aad": Method(lambda: [AaD(weight=0.5, decay=0)], "batches"),
    # Its memory holds predictions as they stand out in their micro-batch.
    "atdoc": Method(lambda: [ATDOC(weight=0.5, prior=PRIORS)], None),
    "adda": Method(
        lambda: [ADDA(bert(), ramp=None, hidden_sizes=(8,), bounded=False)],
        "rows",
        keeps=("bert.pooler", "classifier"),
    ),
    "afn": Method(lambda: [AFN()], "rows"),
    "afn_hard": Method(lambda: [AFN(radius=5.0)], "batches"),
    "bnm": Method(lambda: [BNM()], "batches"),
    "cmd": Method(lambda: [CMD()], "batches"),
    "coral": Method(lambda: [CORAL()], "batches"),
    "dann": Method(lambda: [DANN(ramp=None, hidden_sizes=(8,))], "rows"),
    "deep_jdot": Method(lambda: [DeepJDOT()], "batches"),
    "deep_jdot_unbalanced": Method(lambda: [DeepJDOT(unbalanced=1.0)], "batches"),
    "entropy_minimization": Method(lambda: [EntropyMinimization()], "rows"),
    "fgm": Method(lambda: [FGM()], "rows"),
    "cdan": Method(lambda: [CDAN(ramp=None, hidden_sizes=(8,))], "batches"),
    "cdan_rows": Method(
        lambda: [CDAN(ramp=None, hidden_sizes=(8,), entropy_conditioning=False)], "rows"
    ),
    "importance_weighting": Method(lambda: [ImportanceWeighting(learning_rate=0.1)], "batches"),
    "information_maximization": Method(lambda: [InformationMaximization(weight=0.3)], "batches"),
    "information_maximization_prior": Method(
        lambda: [InformationMaximization(weight=0.3, prior=PRIORS)], "batches"
    ),
    "mcd": Method(lambda: [MCD(ramp=None, hidden_sizes=(8,))], "rows"),
    "mdd": Method(lambda: [MDD(ramp=None, hidden_sizes=(8,))], "rows"),
    "mmd": Method(lambda: [MMD(weight=0.5)], "batches"),
    "pada": Method(lambda: [PADA(ramp=None, hidden_sizes=(8,), momentum=0.3)], "rows"),
    "prior_correction": Method(lambda: [PriorCorrection()], "rows", corrects=("classifier.bias",)),
    "self_training": Method(
        lambda: [SelfTraining(shares=(0.9, 0.9), refreshes=(0, 0.5), prior=PRIORS)], "rows"
    ),
    "self_training_teacher": Method(
        lambda: [
            SelfTraining(refreshes=(0, 0.4, 0.7), teacher_decay=0.5, view=masked, prior="estimate")
        ],
        None,
    ),
    "jmmd": Method(lambda: [JMMD(weight=0.5)], "batches"),
    "mcc": Method(lambda: [MCC(weight=0.3)], "batches"),
    "rdrop": Method(lambda: [RDrop()], "rows"),
    "sam": Method(
        lambda: [MMD(weight=0.5), SAM()],
        "batches",
        refuses_checkpointing="gradient checkpointing computes parts of that forward again",
    ),
    "shot": Method(lambda: [SHOT(prior=PRIORS)], "batches", keeps=("classifier",)),
    "supervised_contrastive": Method(lambda: [SupervisedContrastive()], "batches"),
    "target_language_modeling": Method(
        lambda: [TargetLanguageModeling(tokenizer=tokenizer(), mask_probability=0.3, warmup=0)],
        "rows",
    ),
    "vat": Method(lambda: [VAT()], None),
    "replay": Method(
        lambda: [Replay(ReplayMemory.from_dataset(old(), 9), ratio=0.5, weight=0.7)],
        "rows",
        for_tokens=lambda: [Replay(old("token"), ratio=0.5)],
        uses_target=False,
        files=("replay_memory",),
    ),
    "keep_predictions": Method(
        lambda: [KeepPredictions(0.5, temperature=2.0)], "rows", uses_target=False
    ),
    "keep_predictions_of_the_memory": Method(
        lambda: [Replay(old(), ratio=0.5), KeepPredictions(0.5, on="replay")],
        "rows",
        for_tokens=lambda: [Replay(old("token")), KeepPredictions(0.5, on="replay")],
        uses_target=False,
    ),
    **{
        f"consolidation_{form}": Method(
            lambda form=form: [Consolidation(Fisher(old()), form=form)],
            "rows",
            for_tokens=lambda form=form: [Consolidation(Fisher(old("token")), form=form)],
            refuses_adapters="follows single weights" if form == "rates" else None,
            uses_target=False,
        )
        for form in ("decoupled", "gradient", "rates")
    },
    "consolidation_si": Method(
        lambda: [Consolidation(SI(), form="gradient")],
        "rows",
        refuses_adapters="follows single weights",
        uses_target=False,
    ),
    "agem": Method(
        lambda: [AGEM(old(), batch_size=6)],
        "rows",
        for_tokens=lambda: [AGEM(old("token"), batch_size=6)],
        uses_target=False,
    ),
    **{
        f"averaged_{kind}": Method(
            lambda kind=kind: [AveragedWeights(kind, final=False)], "rows", uses_target=False
        )
        for kind in ("ema", "soup", "sfa")
    },
    **{
        f"soft_sharing_{norm}": Method(
            lambda norm=norm: [SoftSharing(bert(seed=1), 0.5, norm)],
            "rows",
            refuses_adapters="the model has an adapter",
            uses_target=False,
        )
        for norm in ("l2", "trace")
    },
    **{
        f"multi_task{name}": Method(
            lambda options=options: [tasks(**options())],
            accumulation,
            for_tokens=lambda options=options: [tasks("token", **options())],
            uses_target=False,
            files=files,
        )
        for name, accumulation, files, options in (
            ("", "rows", (), lambda: {}),
            ("_uncertainty", "rows", (), lambda: {"weighting": Uncertainty()}),
            ("_famo", "rows", (), lambda: {"weighting": FAMO()}),
            ("_gradnorm", "rows", (), lambda: {"weighting": GradNorm()}),
            ("_pcgrad", "rows", (), lambda: {"surgery": pcgrad}),
            ("_diagnosis", "rows", (), lambda: {"diagnose_every": 1}),
        )
    },
    "dark_replay": Method(
        lambda: [DarkReplay(old_with_logits(), ratio=0.5, weight=0.7)],
        "rows",
        refuses_tokens="one vector for each row",
        for_tokens=lambda: [DarkReplay(old_with_logits("token"))],
        uses_target=False,
    ),
}
SUMS = [name for name, method in METHODS.items() if method.accumulation == "rows"]
COUPLED = [name for name, method in METHODS.items() if method.accumulation == "batches"]


def target(labels: int | None = None, head: str = "row") -> Any:
    """Rows of other tokens than the source's; with labels drawn by a seed, or without."""
    made = rows(23, 2, None, low=20)
    if labels is None:
        return made
    own = rows(23, labels, head)
    return made.add_column("labels", [row["labels"] for row in own])


def make_trainer(
    folder: Path,
    adaptations: Sequence[Adaptation],
    model: Any = None,
    target_dataset: Any = None,
    labels: str = "row",
    args: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    cls: type[Trainer] = Trainer,
    **settings: Any,
) -> Trainer:
    """A Trainer of a tiny BERT with 40 source rows, if it needs them, and 23 target rows."""
    found = target() if target_dataset is None else target_dataset
    has_source = not any(adaptation.source_free for adaptation in adaptations)
    # As many as all steps take: what comes after them differs between numbers of processes.
    train: Any = rows(40, 1, labels)
    if any(isinstance(adaptation, MultiTask) for adaptation in adaptations):
        train = mixed(labels)
    if not has_source:
        train = concatenate_datasets([found] * 2)
    trainer = cls(
        bert() if model is None else model,
        arguments(folder, **settings) if args is None else args,
        train_dataset=train,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    # Which adapt to no target.
    others = ("hf_adapt.continual.", "hf_adapt.multitask.", "hf_adapt.unfreezing.")
    adapts = [a for a in adaptations if not type(a).__module__.startswith(others)]
    return adapt(trainer, *adaptations, target_dataset=found if has_source and adapts else None)


def state_of(adaptations: Sequence[Adaptation]) -> dict[str, Any]:
    """All that adaptations learn and keep: their modules' weights and their states."""
    state: dict[str, Any] = {}
    for adaptation in adaptations:
        state |= _flat(adaptation.name, adaptation.state_dict())
        if adaptation.module is not None:
            state |= _flat(f"{adaptation.name}.module", weights(adaptation.module))
    return state


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested dicts and lists as one dict."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {name: value.detach().clone() if isinstance(value, torch.Tensor) else value}
    return {k: v for key, each in items for k, v in _flat(f"{name}.{key}", each).items()}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same names and values, tensors to the last bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
