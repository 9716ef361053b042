"""Several tasks in one training: a head for each, one loss of all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import nn

from hf_adapt.engine.adaptation import Objective, Term
from hf_adapt.engine.auxiliary import seed_for
from hf_adapt.engine.batch import Batch, Rows
from hf_adapt.engine.checkpoint import WEIGHTS_FILE, load_weights
from hf_adapt.engine.gradients import loss_scale
from hf_adapt.engine.mixins import EvaluationView, GradientTransform, LossCombiner, RowRouting
from hf_adapt.engine.normalisation import label_count
from hf_adapt.engine.parts import Part
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.streams import TRAINING, Routing
from hf_adapt.engine.sweep import evaluating
from hf_adapt.engine.training import added_inputs, checkpoint_without_reentry, unwrapped_model
from hf_adapt.models.groups import layer_groups
from hf_adapt.models.state import preserved_random_state
from hf_adapt.multitask.diagnosis import TaskDiagnosis
from hf_adapt.multitask.loss_weights import FixedWeights, LossWeights
from hf_adapt.multitask.mixture import Mixture, StreamedMixture
from hf_adapt.multitask.task_gradients import Surgery, TaskGradients
from hf_adapt.multitask.task_heads import TaskHeads, in_full_precision
from hf_adapt.multitask.task_models import TaskModel, TaskSpec

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

Tasks = Mapping[str, TaskSpec | None] | Sequence[str | tuple[str, TaskSpec]]
Weighting = LossWeights | Mapping[str, float | Schedule]


class MultiTask(Objective, LossCombiner, RowRouting, EvaluationView, GradientTransform):
    r"""Train one body with a head for each of several tasks (hard parameter sharing).

    .. math::
        L = \sum_k w_k \frac{1}{N_k} \sum_{i \in k} \ell_k(x_i, y_i)

    `train_dataset` holds the rows of all tasks, with their names in a column, as [`mix`] makes it.
    The first task is that of the Trainer's model, learnt by the Trainer's own loss; each further
    one has a head of its own on the same body, outside the model, or shares the model's head. A
    task's loss is the mean over its own labels in the whole step of the optimizer, N: how often its
    rows come changes how well its mean is known, not how much it counts.

    An evaluation of a dict of data sets by the tasks' names is the Trainer's own, of the model of
    each task: `eval_<task>_loss`, and what `TaskSpec.metrics` (or `compute_metrics`) gives.
    `export` writes the model of a task as a plain Hugging Face model.

    Reference:
        Caruana 1997, "Multitask Learning", Machine Learning 28.

    Args:
        tasks: A [`TaskSpec`] for each task, the Trainer's own first; names alone take the default.
        weighting: How much each loss counts: 1 for all, a dict of numbers or schedules by task, or
            one of [`Uncertainty`], [`DynamicWeightAverage`], [`FAMO`], [`GradNorm`],
            [`InverseLogClasses`], [`RandomWeights`].
        surgery: Makes one direction of the tasks' gradients over the whole step: [`pcgrad`],
            [`cagrad`], [`mgda`], [`imtl_g`], [`nash_mtl`], [`aligned_mtl`], or a function of yours
            from (K, P) to (P,). It costs K times the memory of the shared weights' gradients.
        diagnose_every: Steps between two looks at what the tasks do to each other: the cosines of
            their gradients, and how a step on one changes the losses of all. What was found is
            logged, warned of, and written to the output folder as `task_affinity.json` and as heat
            maps. 0 for none.
        column: The column of the rows that names their task.
        learning_rate: Of the heads; the Trainer's by default.
        name: Prefix of what is logged and stored.

    Logs:
        - `multitask/<task>`: the loss of each further task; `loss/task` is the first one's.
        - `multitask/weight/<task>`: its weight, where it is not fixed at 1.
        - `multitask/cosine/<a>~<b>`, `multitask/affinity/<a>-><b>`: with `diagnose_every`.

    Raises:
        TypeError: If a description or the weighting is none.
        ValueError: If there are fewer than two tasks, two of one name, or an option is out of
            range; in training, if rows or labels do not fit their task.

    Example:
        >>> tasks = MultiTask({"sentiment": TaskSpec(), "spam": TaskSpec(num_labels=2)})
        >>> tasks.own_task, tasks.streams
        ('sentiment', ('spam',))
    """

    def __init__(
        self,
        tasks: Tasks,
        *,
        weighting: Weighting | None = None,
        surgery: Surgery | None = None,
        diagnose_every: int = 0,
        column: str = "task",
        learning_rate: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, name=name)
        self.tasks = _described(tasks)
        self.own_task, *others = self.tasks
        self.streams: tuple[str, ...] = tuple(others)
        own = self.tasks[self.own_task]
        if own.loss is not None or own.collator is not None or own.labels_column is not None:
            raise ValueError(
                f"{self.own_task!r} is the Trainer's own task, whose rows have its label columns: "
                "give its loss to the Trainer (compute_loss_func=), its collator too "
                "(data_collator=), and rename its labels to 'labels'."
            )
        if weighting is None:
            weighting = LossWeights()
        elif isinstance(weighting, Mapping):
            weighting = FixedWeights(weighting)
        if not isinstance(weighting, LossWeights):
            raise TypeError(
                f"weighting={weighting!r} is a {type(weighting).__name__}; expected a dict of "
                "numbers by task, or one of Uncertainty(), DynamicWeightAverage(), FAMO(), "
                "GradNorm(), InverseLogClasses(), RandomWeights()."
            )
        if surgery is not None and not callable(surgery):
            raise TypeError(f"surgery={surgery!r} is no function of gradients, as pcgrad is.")
        if diagnose_every < 0:
            raise ValueError(f"diagnose_every={diagnose_every} must be a number of steps, or 0.")
        self.weighting, self.surgery, self.diagnose_every = weighting, surgery, diagnose_every
        self.column = column
        self._rate = learning_rate
        self.heads: TaskHeads | None = None
        self._are_new = True
        self.diagnosis: TaskDiagnosis | None = None
        self._gradients: TaskGradients | None = None
        self._trainer: Trainer | None = None
        self._undo: Callable[[], None] | None = None

    # ---- the start of a run ----

    def _prepare(self, trainer: Trainer) -> TaskHeads:
        """Make the heads of the further tasks, once for a model of the Trainer."""
        self._trainer, args = trainer, trainer.args
        if self.heads is None or self.heads.model is not unwrapped_model(trainer):
            self.heads = TaskHeads(trainer, self.tasks, seed_for(self.name, args.seed))
            self.module, self._are_new = None, not self._load_heads()
        self.learning_rate = args.learning_rate if self._rate is None else self._rate
        self.weight_decay = args.weight_decay
        return self.heads

    def _load_heads(self) -> bool:
        """Read the heads that were saved beside the model which the Trainer's was loaded from."""
        assert self.heads is not None
        self.module = self._modules()
        if self.module is None:
            return True
        folder = str(getattr(self.heads.base, "name_or_path", None) or "")
        path = os.path.join(folder, WEIGHTS_FILE)
        if not folder or not os.path.isfile(path):
            return False
        with safe_open(path, "pt") as file:
            if not any(key.startswith(f"{self.name}.") for key in file.keys()):
                return False
        try:
            found = load_weights([self], folder)
        except ValueError as error:
            logger.warning(
                "The heads in %s are those of other tasks, and are new here: %s", folder, error
            )
            return False
        if found:
            logger.info("The heads of %s are those in %s.", ", ".join(self.models), folder)
        return found

    @property
    def models(self) -> Mapping[str, TaskModel]:
        """The models of the tasks that have a head of their own, made when training begins."""
        return {} if self.heads is None else self.heads.models

    def routing(self, trainer: Trainer) -> Routing:
        """The rows of further tasks, and how they are collated."""
        return self._prepare(trainer).routing(trainer, self.column)

    def setup(self, trainer: Trainer) -> None:
        """Learn of the tasks' sizes."""
        heads = self._prepare(trainer)
        if self.models and (added := sorted(added_inputs(trainer))):
            raise ValueError(
                f"Another adaptation adds {', '.join(added)} to the inputs of the Trainer's model, "
                f"and the heads of {', '.join(self.models)} run on its body alone, which knows "
                "nothing of them. Leave one of the two out, or share the head "
                "(TaskSpec(head='shared'))."
            )
        if self._keeps_gradients and trainer.args.torch_compile:
            raise ValueError(
                "surgery=, diagnose_every= and GradNorm go through a graph several times, which a "
                "compiled one does not allow. Leave torch_compile out, or them."
            )
        self.weighting.begin(list(self.tasks), [heads.head(task).size for task in self.tasks])

    def build_modules(self, batch: Batch) -> nn.Module | None:
        """The heads."""
        self._are_new = False
        return self._modules()

    def _modules(self) -> nn.Module | None:
        weights = {
            f"{task}/{name.replace('.', '/')}": parameter
            for task, model in self.models.items()
            for name, parameter in model.own.items()
        }
        return nn.ModuleDict({"heads": nn.ParameterDict(weights)}) if weights else None

    @property
    def _keeps_gradients(self) -> bool:
        needs = self.diagnose_every > 0 or self.weighting.observes_norms
        return needs or self.surgery is not None

    @property
    def transforms_gradients(self) -> bool:
        """Whether it works on whole gradients, or observes whole steps."""
        return self._keeps_gradients or self.weighting.observes_losses

    def begin(self, trainer: Trainer) -> None:
        """Find the shared weights."""
        heads = self._prepare(trainer)
        own = {id(p) for p in heads.body.parameters()}
        named = {n: p for n, p in heads.model.named_parameters() if p.requires_grad}
        shared = [p for p in named.values() if id(p) in own]
        self._others = [p for p in named.values() if id(p) not in own]
        if not self._keeps_gradients:
            return
        if not shared:
            raise ValueError("No weight of the model's body trains: the tasks share none.")
        self._undo = checkpoint_without_reentry(heads.model)  # a graph is gone through twice
        found = layer_groups(heads.model)
        groups = {
            group.name: kept
            for group in found
            if (kept := [p for n in group.parameters if id(p := named[n]) in own])
        }
        if self.diagnose_every:
            self.diagnosis = TaskDiagnosis(list(self.tasks), groups)
        # Not a pooler above it, which heads of tokens do not read.
        layers = [g.name for g in found if g.kind == "layer" and g.name in groups]
        self._last_layer = groups[layers[-1]] if layers else shared
        only_norms = not self.diagnose_every and self.surgery is None
        self._gradients = TaskGradients(self._last_layer if only_norms else shared, len(self.tasks))

    # ---- each step ----

    def before_step(self, step: int) -> None:
        """Set the weights of the step."""
        assert self._trainer is not None
        trainer, args = self._trainer, self._trainer.args
        progress = step / max(1, trainer.state.max_steps)
        self._weights = self.weighting.weights(step, progress, args.seed).to(args.device)
        self._totals = torch.zeros(len(self.tasks), device=args.device)
        self._diagnoses = bool(self.diagnose_every) and step % self.diagnose_every == 0
        if self._gradients is not None:
            self._gradients.reset()
        self._micro_batch = 0

    def num_items(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        """The labels of each further task."""
        device = cast(Any, rows.model).device
        nothing = torch.zeros((), dtype=torch.long, device=device)
        return {
            task: sum((_labels(model, part) for part in _parts(rows, task)), nothing)
            for task, model in self.models.items()
        }

    def loss(self, batch: Batch) -> dict[str, Term]:
        """The loss of each further task, summed over its labels."""
        assert self._trainer is not None
        found: dict[str, Term] = {}
        for task, model in self.models.items():
            total = torch.zeros((), device=self._trainer.args.device)
            count = torch.zeros((), dtype=torch.long, device=total.device)
            for part in _parts(batch, task):
                with self._trainer.compute_loss_context_manager():
                    mean = model.loss(part.inputs)
                labels = _labels(model, part)
                # A mean over no label is NaN.
                total = total + torch.where(labels > 0, mean * labels, torch.zeros_like(mean))
                count = count + labels
            found[task] = total, count
        if type(self.weighting) is not LossWeights and hasattr(self, "_weights"):
            for task, weight in zip(self.tasks, self._weights, strict=True):
                batch.log(f"weight/{task}", weight)
        return found

    def combine(
        self, losses: Mapping[str, torch.Tensor], weights: Mapping[str, float], batch: Batch
    ) -> torch.Tensor:
        """The weighted losses of the tasks, and the other terms of the run."""
        assert self._trainer is not None
        names = {task: task if task in losses else f"{self.name}/{task}" for task in self.streams}
        names[self.own_task] = "task"
        shares = [losses[names[task]].float() for task in self.tasks]
        self._totals += torch.stack([each.detach() for each in shares])
        scaled = [each * weights[names[t]] for each, t in zip(shares, self.tasks, strict=True)]
        # Not one tensor: the way back of each must go through its own rows alone.
        terms = [weight * loss for weight, loss in zip(self._weights, scaled, strict=True)]
        others = [
            weights[name] * loss for name, loss in losses.items() if name not in names.values()
        ]
        rest = sum(others, torch.zeros((), device=self._totals.device))
        return self._with_gradients(terms, rest, shares, batch)

    def _with_gradients(
        self,
        terms: list[torch.Tensor],
        rest: torch.Tensor,
        shares: list[torch.Tensor],
        batch: Batch,
    ) -> torch.Tensor:
        """The loss; the tasks' gradients are kept apart where they are needed."""
        gradients, trainer = self._gradients, self._trainer
        loss = sum(terms, rest)
        if gradients is None or not torch.is_grad_enabled():
            return loss
        assert trainer is not None
        self._micro_batch += 1
        if self.surgery is None:
            if self._diagnoses or self.weighting.observes_norms:
                given = shares if self.weighting.observes_norms else terms
                gradients.add(trainer, given, keeps_graph=True)
                self._look(batch, given)
            return loss
        modules = [] if self.module is None else list(self.module.parameters())
        surrogate = gradients.add(
            trainer, terms, [*self._others, *modules], keeps_graph=rest.requires_grad
        )
        self._look(batch, terms)
        if trainer.accelerator.num_processes > 1:  # DDP waits for a gradient of each weight
            zeros = [(weight * 0).sum() for weight in gradients.parameters]
            surrogate = surrogate + torch.stack(zeros).sum()
        value = sum((term.detach() for term in terms), rest)
        return value + (surrogate - surrogate.detach())

    def _look(self, batch: Batch, shares: Sequence[torch.Tensor]) -> None:
        """On the first micro-batch of some steps: how a step on one task changes the others."""
        if not self._diagnoses or self._micro_batch > 1:
            return
        assert self.diagnosis is not None and self._gradients is not None
        assert self._trainer is not None and self.heads is not None
        with ExitStack() as stack:
            stack.enter_context(preserved_random_state())
            stack.enter_context(evaluating(self.heads.model))
            stack.enter_context(torch.no_grad())
            # A step that lowers a loss by a hundredth is lost in the rounding of bf16.
            own_models = [model.model for model in self.models.values()]
            stack.enter_context(in_full_precision([self.heads.model, *own_models]))
            values = torch.stack([share.detach() for share in shares])
            self.diagnosis.add_affinity(self._gradients, values, lambda: self._losses(batch))

    def _losses(self, batch: Batch) -> torch.Tensor:
        """The mean loss of each task on a micro-batch, NaN for one without rows."""
        assert self.heads is not None
        trainer, own = cast(Any, self._trainer), self.heads.model
        found = []
        for task in self.tasks:
            stream = TRAINING if task == self.own_task else task
            part = next((p for p in batch.parts if p.stream == stream and len(p.domain)), None)
            if part is None:
                found.append(torch.full((), torch.nan, device=trainer.args.device))
            elif task in self.models:
                found.append(self.models[task].loss(part.inputs))
            else:
                found.append(trainer._base_loss(own, dict(part.inputs), None).float())
        return torch.stack(found)

    def transform_gradients(self, model: nn.Module) -> None:
        """Observe the step, and write the direction that the surgery found."""
        trainer = self._trainer
        assert trainer is not None
        sums = None if self._gradients is None else self._gradients.averaged(trainer)
        if sums is not None and loss_scale(trainer) is not None and not sums.isfinite().all():
            if self.surgery is not None and self._gradients is not None:
                self._gradients.write(sums.sum(0))  # the scaler finds the overflow
            return
        if self.weighting.observes_losses:
            totals = trainer.accelerator.reduce(self._totals.clone(), reduction="mean")
            losses = torch.where(totals == 0, torch.nan, totals).cpu()
            norms = None
            if self.weighting.observes_norms:
                assert self._gradients is not None and sums is not None
                norms = self._gradients.of(sums, self._last_layer).norm(dim=1).cpu()
                if self.surgery is not None:
                    norms = norms / self._weights.cpu().clamp(min=1e-8)
            self.weighting.observe(losses, norms)
        if self._gradients is None or sums is None:
            return
        if self._diagnoses and self.diagnosis is not None:
            self.diagnosis.add_cosines(self._gradients, sums)
        if self.surgery is not None:
            # A task without rows in this step has no say in it. (`any` takes far longer.)
            present = (sums.amax(1) != 0) | (sums.amin(1) != 0)
            if bool(present.any()):
                given = sums if bool(present.all()) else sums[present]  # no copy where all are
                self._gradients.write(self._direction(trainer, given))

    def _direction(self, trainer: Trainer, gradients: torch.Tensor) -> torch.Tensor:
        """The direction that the surgery makes of the gradients of a step."""
        assert self.surgery is not None
        # On each process the same orders, and others in each step.
        seed = seed_for(f"{self.name}/{trainer.state.global_step}", trainer.args.seed)
        with preserved_random_state(seed):
            direction = self.surgery(gradients)
        if direction.shape != gradients[0].shape:
            raise ValueError(
                f"surgery= returned {tuple(direction.shape)} for gradients of shape "
                f"{tuple(gradients.shape)}; expected {tuple(gradients[0].shape)}."
            )
        return direction

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Add what the tasks do to each other."""
        if self.diagnosis is not None:
            found = self.diagnosis.logs()
            logs.update({f"{self.name}/{name}": value for name, value in found.items()})

    def finish(self, trainer: Trainer) -> None:
        """Warn of tasks that harm others, and write what was found."""
        if self.diagnosis is not None:
            self.diagnosis.warn()
            if trainer.args.should_save:
                self.diagnosis.save(Path(trainer.args.output_dir or "."))

    def state_dict(self) -> dict[str, Any]:
        """What the weighting and the diagnosis have seen."""
        seen = {} if self.diagnosis is None else self.diagnosis.state_dict()
        return {"weighting": self.weighting.state_dict(), "diagnosis": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.weighting.load_state_dict(state["weighting"])
        if self.diagnosis is not None and state["diagnosis"]:
            self.diagnosis.load_state_dict(state["diagnosis"])

    def close(self) -> None:
        """Let the gradients' memory go."""
        self._gradients = None
        if self._undo is not None:
            self._undo()
            self._undo = None

    # ---- evaluation and export ----

    @contextmanager
    def around_evaluation(self, trainer: Trainer, prefix: str) -> Iterator[None]:
        """The Trainer's model, collator and metrics are those of the task that is evaluated."""
        if isinstance(trainer.eval_dataset, Mixture | StreamedMixture):
            raise ValueError(
                "eval_dataset is a mixture, and each task has metrics of its own. Pass a dict of "
                f"data sets by the tasks' names: {', '.join(map(repr, self.tasks))}."
            )
        named = [task for task in self.tasks if prefix.endswith(f"_{task}")]
        if not named:
            yield
            return
        task = max(named, key=len)
        changed = self._prepare(trainer).view(trainer, task)
        if task in self.models and self._are_new:
            logger.warning("The head of the task %r is new, and has not been trained.", task)
        before = {name: vars(trainer).get(name) for name in changed}
        vars(trainer).update(changed)
        try:
            yield
        finally:
            vars(trainer).update(before)

    def export(self, task: str, folder: str | os.PathLike[str]) -> None:
        """Write the model of one task as a plain Hugging Face model, which `from_pretrained` loads.

        LoRA adapters are merged into its weights; the model in training stays as it is. The
        tokenizer is written beside it.

        Args:
            task: Its name.
            folder: Made if it is missing.

        Raises:
            ValueError: If there is no such task, or no model yet.
        """
        if task not in self.tasks:
            raise ValueError(f"{task!r} is none of the tasks {', '.join(map(repr, self.tasks))}.")
        if self.heads is None or self._trainer is None:
            raise ValueError(
                "There is no model yet: the heads are made when training or an evaluation begins."
            )
        self.heads.export(task, folder)
        if (tokenizer := self._trainer.processing_class) is not None:
            tokenizer.save_pretrained(str(folder))


def _described(tasks: Tasks) -> dict[str, TaskSpec]:
    """The descriptions by the tasks' names, checked."""
    if isinstance(tasks, Mapping):
        pairs = list(tasks.items())
    else:
        pairs = [(each, None) if isinstance(each, str) else each for each in tasks]
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two tasks are named {', '.join(map(repr, twice))}: each needs its own.")
    if len(names) < 2:
        raise ValueError(
            f"MultiTask needs two tasks or more, the Trainer's own first; got {names}."
        )
    for name, spec in pairs:
        if spec is not None and not isinstance(spec, TaskSpec):
            raise TypeError(
                f"The description of the task {name!r} is a {type(spec).__name__}: expected a "
                "TaskSpec."
            )
        if not name or "/" in name or "." in name or name == TRAINING:
            raise ValueError(
                f"The name of a task, {name!r}, must be without '/' and '.', and not {TRAINING!r}."
            )
    return {name: TaskSpec() if spec is None else spec for name, spec in pairs}


def _parts(rows: Rows, task: str) -> list[Part]:
    return [part for part in rows.parts if part.stream == task and len(part.domain)]


def _labels(model: TaskModel, part: Part) -> torch.Tensor:
    """The labels that a task's mean is over; rows, where they cannot be counted."""
    count = label_count(model.model, part.inputs)
    return torch.tensor(len(part.domain), device=part.domain.device) if count is None else count
