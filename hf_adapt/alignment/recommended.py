"""The recipe that is taken where a target is given and nothing is said of what to do with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hf_adapt.alignment.class_confusion import MCC
from hf_adapt.alignment.self_training import SelfTraining
from hf_adapt.engine.adaptation import Adaptation

WHY = (
    "it gained most on pairs of domains where the target's class frequencies were given "
    "(target_priors=), and not on all of them"
)


def recommended() -> list[Adaptation]:
    """The recommended adaptations for a classifier and a target without labels.

    Today class-balanced self-training, which `AdaptationCallback(target_dataset=target)` takes by
    itself. Give it the target's class frequencies, if only roughly: `target_priors=`.

    Example:
        >>> [type(each).__name__ for each in recommended()]
        ['SelfTraining']
    """
    return [SelfTraining()]


def candidates() -> dict[str, Callable[[], Sequence[Adaptation]]]:
    """The adaptations to choose from where nothing is known of the target, by name.

    Functions that return new ones, for [`hf_adapt.evaluation.train_and_choose`]. Few, since each
    further one is a further chance of a wrong choice, and none that trains on neighbours, by which
    the choice is made.

    Example:
        >>> list(candidates())
        ['SelfTraining', 'MCC']
    """
    return {
        "SelfTraining": lambda: [SelfTraining()],
        "MCC": lambda: [MCC()],
    }
