"""A plan of a run's phases: to print, save as YAML, edit and pass to the callback."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from hf_adapt.models.groups import LayerGroup, layer_groups
from hf_adapt.models.layers import prefixes
from hf_adapt.unfreezing.costs import GroupCost, PhaseCost, phase_cost
from hf_adapt.unfreezing.phases import Clock, Phase, Timeline
from hf_adapt.unfreezing.plan_file import PLATEAU_KEYS, read_plan_file
from hf_adapt.unfreezing.plateau import Plateau
from hf_adapt.unfreezing.schedules import select


@dataclass
class UnfreezingPlan:
    """Which layer groups train when, and with which learning-rate multipliers.

    `unfreezing_plan` returns one, `load` reads one from a file, `GradualUnfreezingCallback` takes
    one.

    Attributes:
        groups: Names of the layer groups, bottom first, each with the patterns (names of modules
            or parameters, or regular expressions) of its parameters.
        phases: The groups that train, and from when on.
        lr_multipliers: Learning-rate multipliers of groups; a group that is not named has 1.
        rewarm_steps: Steps over which the learning rate of a newly unfrozen group rises.
        plateau: The rule that starts the phases at `"plateau"`.
        clock: The length of the run, if it is known; used only to print the plan.
        costs: The sizes of the groups; used only to print the plan.
        path: The file that the plan was read from, for error messages.
    """

    groups: dict[str, tuple[str, ...]]
    phases: list[Phase]
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    rewarm_steps: int = 0
    plateau: Plateau | None = None
    clock: Clock | None = None
    costs: dict[str, GroupCost] | None = None
    path: str | os.PathLike[str] | None = field(default=None, compare=False, repr=False)

    # ---- bound to a model and a run ----

    def bind(self, model: nn.Module) -> list[LayerGroup]:
        """Find the plan's groups in a model.

        Raises:
            ValueError: If groups overlap, match nothing, or leave out trainable parameters.
        """
        try:
            return layer_groups(model, self.groups)
        except ValueError as error:
            if self.path is None:
                raise
            raise ValueError(f"{self.path}: {error}") from error

    def trained(self, groups: Sequence[LayerGroup]) -> list[frozenset[str]]:
        """The groups that each phase trains.

        Raises:
            ValueError: If the plan has no phase, or a phase trains nothing or starts too late.
        """
        if not self.phases:
            raise ValueError("The schedule is empty: a plan needs at least one phase, at step 0.")
        first = self.phases[0]
        if first.at.amount != 0 or first.at.unit == "plateau":
            raise ValueError(
                f"{first.where}The first phase starts at {first.at}: nothing would train before. "
                "Let it start at 0."
            )
        waiting = [phase.at.unit == "plateau" for phase in self.phases]
        late = next((i for i in range(1, len(waiting)) if waiting[i - 1] and not waiting[i]), None)
        if late is not None:
            raise ValueError(
                f"{self.phases[late].where}The phase at {self.phases[late].at} comes after one "
                "that waits for a plateau, which may come later or never. Let all phases after a "
                "plateau wait for one as well."
            )
        if self.plateau is None and any(waiting):
            raise ValueError(
                f"{self.phases[waiting.index(True)].where}A phase waits for a plateau, but the "
                "plan has no `plateau:` rule (metric, patience)."
            )
        for phase in self.phases:
            if not phase.train:
                raise ValueError(
                    f"{phase.where}The phase at {phase.at} trains no group: name at least one."
                )
        return [frozenset(select(phase.train, groups)) for phase in self.phases]

    def timeline(
        self, groups: Sequence[LayerGroup], clock: Clock, plateau_steps: Sequence[int] = ()
    ) -> Timeline:
        """Which groups train at which step.

        Args:
            groups: The groups of the model.
            clock: The length of the run.
            plateau_steps: The steps of the plateaus so far.

        Raises:
            ValueError: If a phase starts after the last step, or before the phase listed above it.
        """
        trained = self.trained(groups)
        starts: list[int] = []
        waiting = list(plateau_steps)
        for phase in self.phases:
            if phase.at.unit == "plateau":
                if not waiting:
                    break
                start = waiting.pop(0)
            else:
                try:
                    start = clock.step_of(phase.at)
                except ValueError as error:
                    raise ValueError(f"{phase.where}{error}") from error
            if starts and start < starts[-1]:
                raise ValueError(
                    f"{phase.where}The phase at {phase.at} (step {start}) comes after one at step "
                    f"{starts[-1]}: write the phases in the order in which they start."
                )
            starts.append(start)
        return Timeline(starts, trained[: len(starts)])

    # ---- printed ----

    def phase_costs(self) -> list[PhaseCost] | None:
        """The predicted cost of each phase; None if the sizes of the groups are unknown."""
        if self.costs is None:
            return None
        names = [LayerGroup(n, (), "other", "", c.level) for n, c in self.costs.items()]
        return [phase_cost(self.costs, trained) for trained in self.trained(names)]

    def __str__(self) -> str:
        header = ["phase", "starts at", "trains", "parameters", "time", "memory", "activations"]
        rows = [header]
        costs = self.phase_costs()
        names = list(self.groups)
        for number, phase in enumerate(self.phases):
            start = str(phase.at)
            if self.clock is not None and self.clock.knows(phase.at):
                step = f"step {self.clock.step_of(phase.at)}"
                shown = (
                    f"{phase.at.amount:.3g}% of the run" if phase.at.unit == "percent" else start
                )
                start = step if phase.at.unit == "step" else f"{step} ({shown})"
            row = [str(number), start, _shortened(phase.train, names)]
            if costs is not None:
                cost = costs[number]
                row += [f"{cost.parameters:,}"]
                row += [f"{x:.0%}" for x in (cost.time, cost.memory, cost.activations)]
            rows.append(row)
        widths = [max(len(r[i]) for r in rows if i < len(r)) for i in range(len(rows[-1]))]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
            for row in rows
        )
        notes = []
        if costs is not None:
            notes.append(
                "time, memory (weights, gradients, AdamW's moments) and stored activations of a "
                "step: predicted, relative to training every group"
            )
        if set(self.lr_multipliers.values()) - {1.0}:
            shown = ", ".join(f"{name} {value:.3g}" for name, value in self.lr_multipliers.items())
            notes.append(f"learning-rate multipliers: {shown}")
        if self.rewarm_steps:
            notes.append(f"a newly unfrozen group warms up over {self.rewarm_steps} steps")
        if self.plateau is not None:
            notes.append(
                f"plateau: {self.plateau.metric} without an improvement in "
                f"{self.plateau.patience} evaluation(s)"
            )
        return "\n".join([table, *notes])

    # ---- saved ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a YAML file, which can be edited.

        Args:
            path: The file; it is replaced if it exists.
        """
        content: dict[str, Any] = {"groups": {k: list(v) for k, v in self.groups.items()}}
        phases: list[dict[str, Any]] = []
        before: tuple[str, ...] = ()
        for phase in self.phases:
            grows = bool(before) and set(before) < set(phase.train)
            named = [n for n in phase.train if n not in before] if grows else list(phase.train)
            at = int(phase.at.amount) if phase.at.unit == "step" else str(phase.at)
            phases.append({"at": at, "add" if grows else "train": named})
            before = phase.train
        content["phases"] = phases
        if self.lr_multipliers:
            content["lr_multipliers"] = {
                k: float(f"{v:.12g}") for k, v in self.lr_multipliers.items()
            }
        if self.rewarm_steps:
            content["rewarm_steps"] = self.rewarm_steps
        if self.plateau is not None:
            content["plateau"] = {k: getattr(self.plateau, k) for k in PLATEAU_KEYS}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            HEADER + yaml.dump(content, Dumper=_FlowLists, sort_keys=False, width=96),
            encoding="utf-8",
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UnfreezingPlan:
        """Read a plan that `save` wrote and that may have been edited.

        Raises:
            ValueError: If a key or value is wrong; the message names the line and similar keys.
            FileNotFoundError: If there is no such file.
        """
        content = read_plan_file(path)
        return cls(
            groups=content["groups"],
            phases=content["phases"],
            lr_multipliers=content.get("lr_multipliers", {}),
            rewarm_steps=content.get("rewarm_steps", 0),
            plateau=content.get("plateau"),
            path=path,
        )


def group_patterns(model: nn.Module, groups: Sequence[LayerGroup]) -> dict[str, tuple[str, ...]]:
    """Each group as few names as possible: a module stands for all its parameters.

    Args:
        model: The model.
        groups: Its layer groups.
    """
    group_of = {name: group.name for group in groups for name in group.parameters}
    inside: dict[str, set[str]] = {}
    for name, group in group_of.items():
        for path in prefixes(name)[1:]:
            inside.setdefault(path, set()).add(group)
    patterns: dict[str, list[str]] = {group.name: [] for group in groups}
    for path, owners in inside.items():  # a module comes before its submodules
        parent = path.rpartition(".")[0]
        if len(owners) == 1 and (not parent or len(inside[parent]) > 1):
            patterns[next(iter(owners))].append(path)
    return {name: tuple(found) for name, found in patterns.items()}


HEADER = """\
# Which layer groups train when. Edit this file and use it: GradualUnfreezingCallback("this file").
# at: a step (120), a percentage of the run ("25%"), epochs ("1.5 epochs") or "plateau"
# train: the groups of the phase; add: further groups besides those of the phase before
# lr_multipliers: what the learning rate of a group is multiplied by
"""


class _FlowLists(yaml.SafeDumper):
    """Lists on one line, mappings with one key per line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        plain = all(not isinstance(item, Mapping) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)


def _shortened(patterns: Sequence[str], names: Sequence[str]) -> str:
    """A short form of a list of groups."""
    found = [n for n in names if n in patterns]
    if len(found) != len(patterns):  # it has regular expressions, which are short already
        return ", ".join(patterns)
    if len(found) == len(names) > 1:
        return "everything"
    runs: list[list[str]] = []
    for name in found:
        if runs and names.index(name) == names.index(runs[-1][-1]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(
        f"{run[0]} … {run[-1]}" if len(run) > 2 else ", ".join(run) for run in reversed(runs)
    )
