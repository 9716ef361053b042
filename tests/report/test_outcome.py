"""The sentences of the first screen, worked out by hand."""

from typing import Any

import pytest

from hf_adapt.report import outcome
from hf_adapt.report.words import listed


def run(method: str, seed: int, accuracy: float | None, role: str = "adapted") -> dict[str, Any]:
    return {"method": method, "seed": seed, "role": role, "oracle": {"accuracy": accuracy}}


def choice(chosen: str, seed: int) -> dict[str, Any]:
    reason = f"Because of {seed}."
    return {"chosen": chosen, "seed": seed, "baseline": "plain", "reason": reason}


RUNS = [
    run("plain", 1, 0.70, "baseline"),
    run("plain", 2, 0.72, "baseline"),
    run("A", 1, 0.80),
    run("A", 2, 0.58),
    run("B", 1, 0.78),
    run("B", 2, 0.82),
    run("top", 1, 0.9, "bound"),
]


@pytest.mark.parametrize(
    ("choices", "said", "accuracy"),
    [
        (
            [],
            "No choice is recorded. hf-adapt run --choose chooses without target labels, and says "
            "why.",
            "best: B with 80.0 ± 2.8 % (+9.0 points)",
        ),
        (
            [choice("A", 1)],
            "Chosen without target labels: A. Because of 1.",
            "chosen: A with 80.0 % (+9.0 points); best: B with 80.0 ± 2.8 % (+9.0 points)",
        ),
        (
            [choice("B", 1), choice("B", 2)],
            "Chosen without target labels: B, with each of 2 seeds. Why: see the choice, seed by "
            "seed.",
            "best: B, which was chosen, with 80.0 ± 2.8 % (+9.0 points)",
        ),
        (
            [choice("A", 1), choice("plain", 2)],
            "Chosen without target labels: A with 1 seed and plain (do not adapt) with 1 seed. "
            "Why: see the choice, seed by seed.",
            "chosen: by seed with 76.0 ± 5.7 % (+5.0 points); best: B with 80.0 ± 2.8 % (+9.0 "
            "points)",
        ),
        (
            [choice("plain", 1)],
            "Chosen without target labels: plain (do not adapt). Because of 1.",
            "best: B with 80.0 ± 2.8 % (+9.0 points)",
        ),
    ],
)
def test_a_pair(choices: list[dict[str, Any]], said: str, accuracy: str) -> None:
    sentence = outcome.chosen(choices)
    assert f"{sentence.lead} {sentence.text}" == said
    levels = outcome.levels_of(RUNS, choices)
    assert levels is not None
    assert outcome.from_labels(levels).text == (
        f"plain has 71.0 ± 1.4 %; {accuracy}; 1 method more than a point below plain; top, trained "
        "on target labels, 90.0 %."
    )


@pytest.mark.parametrize(
    ("used", "said"),
    [
        ((40,), "Chosen by 40 labels of target items: A."),
        ((0, 40), "Chosen, in 1 of 2 by labels of target items: A, with each of 2 seeds."),
        ((None, "many"), "Chosen without target labels: A, with each of 2 seeds."),
    ],
)
def test_labels_that_decided_are_told(used: tuple[Any, ...], said: str) -> None:
    made = [{**choice("A", seed), "labels_used": each} for seed, each in enumerate(used)]
    assert outcome.chosen(made).lead == said


def test_all_pairs() -> None:
    pairs = [
        {"runs": RUNS, "choices": [choice("A", 1), choice("plain", 2)]},
        {"runs": [run("plain", 1, 0.5, "baseline"), run("A", 1, 0.4)], "choices": []},
    ]
    texts = [(each.text, each.oracle) for each in outcome.overall(pairs)]
    assert texts == [
        (
            "an adapted model in 1 of 2 choices, one for each pair and seed; source only in the "
            "others.",
            False,
        ),
        (
            "on average over 2 pairs: source only 60.5 % and the best method of each pair 65.0 %.",
            True,
        ),
    ]
    pairs[1]["choices"] = [choice("plain", 1)]
    assert "the chosen model 63.0 %" in outcome.overall(pairs)[1].text
    assert outcome.overall(pairs[:1]) == []


def test_without_target_labels_there_is_no_outcome() -> None:
    assert outcome.levels_of([run("plain", 1, None, "baseline"), run("A", 1, None)], []) is None


def test_names_with_commas_are_told_apart() -> None:
    assert listed(["a", "b, given", "c"]) == "a; b, given and c"
