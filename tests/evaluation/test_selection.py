"""The choice among candidates, which may be to keep the model without adaptation."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_adapt.alignment import CORAL, MMD
from hf_adapt.engine.callback import collect_items
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.progress import linear_ramp
from hf_adapt.evaluation import Candidate, Neighborhoods, choose, neighbor_agreement
from hf_adapt.evaluation.contest import Contest, aligned_labels, interval
from hf_adapt.evaluation.selection import Choice, _decide
from hf_adapt.evaluation.train_and_choose import Chosen, train_and_choose
from hf_adapt.models.hashing import row_keys
from hf_adapt.storage.checkpoints import last_whole_checkpoint
from tests.helpers.adaptation import length_grouping
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments, same_bits, weights

ROWS = 600


class World:
    """A target whose two classes are two clouds before training, and what models say of it."""

    def __init__(self, seed: int, share: float = 0.5) -> None:
        self.random = np.random.default_rng(seed)
        self.labels = (self.random.random(ROWS) < share).astype(int)
        self.reference = self.random.normal(size=(ROWS, 8))
        self.reference[:, 0] += 2.5 * self.labels
        self.source = self.random.integers(0, 2, ROWS)

    def candidate(
        self,
        name: str,
        quality: float,
        sureness: float = 2.0,
        source: float = 0.9,
        offset: float = 0.0,
    ) -> tuple[Candidate, float]:
        """A model whose scores are the truth and noise, and its accuracy on the target.

        Args:
            name: What it is called.
            quality: Distance of the two classes' scores; the noise has the deviation 1.
            sureness: Factor of the scores.
            source: Accuracy on held-out source items.
            offset: Of all scores, towards one class.
        """
        score = quality * (2 * self.labels - 1) + self.random.normal(size=ROWS) + offset
        logits = sureness * np.stack([-score, score], 1)
        certain = self.random.normal(size=ROWS) + {0.9: 1.3, 0.6: 0.25}[source]
        own = sureness * (2 * self.source - 1) * certain
        made = Candidate.of(
            name,
            np.stack([-own, own], 1),
            self.source,
            logits,
            self.random.normal(size=(ROWS, 4)),
            np.stack([score, self.random.normal(size=ROWS)], 1),
        )
        return made, float((logits.argmax(1) == self.labels).mean())


def grid(seed: int) -> tuple[World, dict[str, Candidate], dict[str, float]]:
    """Source only, and good, mediocre and bad candidates of every kind."""
    world = World(seed, share=(0.5, 0.3, 0.7)[seed % 3])
    made = {
        "source only": world.candidate("source only", 0.6),
        "good": world.candidate("good", (1.2, 0.5, 0.9)[seed % 3 - 1]),
        "mediocre": world.candidate("mediocre", 0.7),
        "worse": world.candidate("worse", 0.2),
        "over-confident": world.candidate("over-confident", 0.3, sureness=50.0),
        "one class": world.candidate("one class", 0.6, offset=9.0),
        "nearly one class": world.candidate("nearly one class", 0.6, offset=3.2),
        "lost the source": world.candidate("lost the source", 1.4, source=0.6),
    }
    return world, {n: c for n, (c, _) in made.items()}, {n: a for n, (_, a) in made.items()}


def test_regret_is_bounded_and_a_collapsed_model_is_never_chosen() -> None:
    regrets = []
    for seed in range(12):
        world, candidates, accuracy = grid(seed)
        choice = choose(list(candidates.values()), reference_features=world.reference)
        assert choice.chosen not in ("one class", "lost the source", "over-confident", "worse")
        eligible = [a for n, a in accuracy.items() if n != "lost the source"]
        regrets.append(max(eligible) - accuracy[choice.chosen])
        assert accuracy[choice.chosen] > accuracy["source only"] - 0.02
        classes = candidates[choice.chosen].target.logits.argmax(1)
        differs = (classes != candidates["source only"].target.logits.argmax(1)).double().mean()
        assert not choice.adapts or f"It gives {differs:.0%} of the items another" in choice.reason
        text = str(choice)
        assert "every target item is given class" in text
        assert "points on held-out source items" in text
        assert json.loads(json.dumps(choice.as_dict()))["chosen"] == choice.chosen
    assert np.mean(regrets) < 0.04 and max(regrets) < 0.12, regrets


def test_source_only_is_kept_where_nothing_is_credibly_better() -> None:
    kept = 0
    for seed in range(10):
        world = World(seed)
        base, _ = world.candidate("source only", 1.0)
        others = [world.candidate(f"m{n}", 0.5)[0] for n in range(3)]
        choice = choose([base, *others], reference_features=world.reference)
        kept += choice.chosen == "source only"
        assert choice.adapts == (choice.chosen != "source only")
    assert kept == 10
    close = [World(3).candidate("source only", 1.0)[0]]
    same = Candidate("same", close[0].source, close[0].target)
    assert choose([*close, same], reference_features=World(3).reference).chosen == "source only"


def test_one_that_is_not_credibly_above_is_refused() -> None:
    order, base = ["other", "source only"], np.tile([0.0, 1.0], 50)
    contest = Contest(
        {"source only": np.zeros(100, int), "other": np.arange(100) % 2},
        torch.arange(100),
        np.full(100, IGNORED),
    )
    found = {"source only": base, "other": np.tile([1.0, 0.0], 50)}
    found["other"][0] = 1.4  # more on average, but not in two of three samples
    chosen, reason, is_open = _decide(order, "source only", found, "neighbors", contest)
    assert chosen == "source only" and is_open
    assert "label fifty of the items on which the candidates disagree" in reason
    found["other"] = base + 0.01
    chosen, reason, is_open = _decide(order, "source only", found, "neighbors", contest)
    assert chosen == "other" and not is_open and "It gives 50% of the items another" in reason


def test_known_frequencies_rule_models_out() -> None:
    world = World(2, share=0.5)
    base, _ = world.candidate("source only", 0.5)
    tilted, _ = world.candidate("tilted", 0.9, offset=1.0)
    fine, _ = world.candidate("fine", 0.8)
    choice = choose([base, tilted, fine], reference_features=world.reference, prior=[0.5, 0.5])
    verdicts = {each.name: each for each in choice.candidates}
    assert choice.chosen == "fine" and not verdicts["tilted"].kept
    assert "points off the known frequencies" in verdicts["tilted"].reason


def test_without_a_reference_the_candidates_judge_each_other() -> None:
    _, candidates, _ = grid(0)
    choice = choose(list(candidates.values()))
    scores = next(each for each in choice.candidates if each.kept).scores
    assert set(scores) == {"ensv", "source_accuracy"}


def some_labels(world: World, numbers: Any) -> Any:
    """The true labels of these target items, -100 for the others."""
    labels = np.full(ROWS, IGNORED)
    labels[numbers] = world.labels[numbers]
    return labels


def test_labels_of_items_on_which_candidates_disagree_decide() -> None:
    inside = adapted = 0
    for seed in range(8):
        world, grid_of, accuracy = grid(seed)
        given = [grid_of[n] for n in ("source only", "good", "mediocre", "worse")]
        before = choose(given)  # no reference: it has little to go by
        classes = np.stack([each.target.logits.argmax(1) for each in given])
        apart = np.flatnonzero((classes != classes[0]).any(0))
        assert sorted(before.to_label) == apart.tolist() and before.labels_used == 0
        assert "to_label" not in before.as_dict()
        labels = some_labels(world, list(before.to_label[:100]))
        after = choose(given, target_labels=labels)
        best = max(accuracy[each.name] for each in given)
        assert accuracy[after.chosen] > best - 0.03 and after.labels_used == 100
        assert f"Chosen by 100 labels of target items: {after.chosen}" in str(after)
        assert after.to_label == before.to_label[100:]
        good = after.candidates[1].scores["labelled_accuracy"]
        assert good == np.mean((classes[1] == labels)[labels != IGNORED])
        gain = 100 * (accuracy[after.chosen] - accuracy["source only"])
        if after.adapts:
            ends = re.findall(r"([+-][\d.]+) to ([+-][\d.]+) points", after.reason)[0]
            adapted += 1
            inside += float(ends[0]) < gain < float(ends[1])
        whole = choose(given, target_labels=some_labels(world, list(before.to_label)))
        if whole.adapts:  # all is known
            gain = 100 * (accuracy[whole.chosen] - accuracy["source only"])
            assert f"on all 600 items {gain:+.1f} points" in whole.reason
    assert inside >= adapted - 1 >= 4  # of intervals of 95 %


def test_labels_of_items_on_which_all_agree_decide_nothing() -> None:
    world, candidates, _ = grid(0)
    given = [candidates["source only"], candidates["good"]]
    options = {"reference_features": world.reference}
    plain = choose(given, **options)
    agreed = sorted(set(range(ROWS)) - set(plain.to_label))
    again = choose(given, **options, target_labels=some_labels(world, agreed))
    assert (again.chosen, again.to_label, again.labels_used) == (plain.chosen, plain.to_label, 0)
    few = choose(given, **options, target_labels=some_labels(world, list(plain.to_label[:4])))
    assert few.labels_used == 0 and "The 4 labels decide nothing: 4 of them are" in few.reason
    assert few.needs_labels and not plain.needs_labels


def test_labels_of_any_items_decide_as_well() -> None:
    world, candidates, accuracy = grid(1)
    given = [candidates[n] for n in ("source only", "good", "worse")]
    anything = world.random.permutation(ROWS)[:120]
    options = {"target_labels": some_labels(world, anything)}
    choice = choose(given, **options, labels_are_random=True)
    assert choice.chosen == "good" and accuracy["good"] > accuracy["source only"] + 0.1
    assert choice.labels_used == len(set(anything) & set(choose(given).to_label))
    assert not choose(given, **options).labels_used  # unless it is said


@pytest.mark.parametrize("change", ["added", "in the place of another", "taken away"])
def test_labels_decide_when_candidates_have_changed_once_theirs_are_there(change: str) -> None:
    """Where two are apart each is often wrong, and a newcomer would be taken for the best."""
    for seed in range(10):
        world = World(seed)
        first, other = (world.candidate(n, 0.9)[0] for n in ("source only", "other"))
        new, _ = world.candidate("new", 0.5)
        before, after = {
            "added": ([first, other], [new, first, other]),
            "in the place of another": ([first, other], [first, new]),
            "taken away": ([first, other, new], [first, other]),
        }[change]
        asked = list(choose(before).to_label[:60])
        options = {"baseline": "source only", "reference_features": world.reference}
        labels = some_labels(world, asked)
        choice = choose(after, **options, target_labels=labels)
        if change == "taken away":
            assert choice.labels_used == len(set(asked) & set(choose(after).to_label)) > 5
            continue
        assert not choice.labels_used and choice.needs_labels
        assert "they leave out items on which these candidates disagree" in choice.reason

        # What the newcomer adds, up to there, makes a random sample of it again.
        order = choose(after, "source only").to_label
        inside = [number for number in order if number in asked]
        added = [n for n in order[: order.index(inside[-1])] if n not in asked]
        assert list(choice.to_label[: len(added)]) == added
        labels[added[0]] = -1  # nobody could tell
        labels[added[1:]] = world.labels[added[1:]]
        again = choose(after, **options, target_labels=labels)
        assert again.labels_used == len(inside) + len(added) - 1 and again.chosen != "new"


def test_the_interval_of_the_gain_holds_it() -> None:
    random = np.random.default_rng(0)
    for wins, losses, count in ((0.5, 0.5, 50), (0.8, 0.2, 50), (0.9, 0.1, 10), (1.0, 0.0, 5)):
        inside = 0
        for _ in range(400):
            all_of_them = random.choice([1.0, -1.0], size=200, p=[wins, losses])
            low, high = interval(random.permutation(all_of_them)[:count], 200, 1.0, 1)
            inside += low <= all_of_them.mean() <= high
            assert -1 <= low < high <= 1
        assert inside >= 0.93 * 400, (wins, count, inside)
    # The best of eight alike.
    inside = 0
    for _ in range(300):
        eight = random.choice([1.0, -1.0], size=(8, 200))
        found = eight[:, random.permutation(200)[:50]]
        best = found.mean(1).argmax()
        low, high = interval(found[best], 200, 0.5, 8)
        inside += low <= eight[best].mean() / 2 <= high
    assert inside >= 0.93 * 300, inside


def test_equal_items_are_labelled_once() -> None:
    world = World(0)
    made = [world.candidate(n, q)[0] for n, q in (("source only", 0.6), ("good", 1.2))]
    keys = torch.arange(ROWS) // 2
    twice = [
        replace(each, target=replace(each.target, keys=keys, logits=each.target.logits[keys]))
        for each in made
    ]
    asked = choose(twice).to_label
    assert len({int(keys[number]) for number in asked}) == len(asked)
    labels = aligned_labels({int(keys[n]): int(world.labels[keys[n]]) for n in asked}, keys)
    assert choose(twice, target_labels=labels).labels_used == len(asked)


def test_labels_may_leave_source_only_in_place() -> None:
    world = World(0)
    base, other = world.candidate("source only", 1.0)[0], world.candidate("other", 0.4)[0]
    labels = some_labels(world, list(choose([base, other]).to_label[:40]))
    assert choose([base, other], target_labels=labels).chosen == "source only"


def test_labels_are_asked_for_as_long_as_something_may_be_won() -> None:
    """Two models, of which each is right where the other is wrong, on 100 of 1,000 items."""
    truth = np.zeros(1000, dtype=int)
    first = np.repeat([0, 1, 0], [50, 50, 900])
    other = np.repeat([1, 0, 0], [50, 50, 900])

    def choice(wins: int, labelled: int) -> Choice:
        truth[:100] = np.repeat([1, 0], [wins, 100 - wins]) ^ (np.arange(100) >= 50)
        given = [
            Candidate.of(n, np.eye(2)[truth], truth, np.eye(2)[classes])
            for n, classes in (("source only", first), ("other", other))
        ]
        asked = choose(given).to_label
        assert sorted(asked) == list(range(100))
        order = sorted(asked[:labelled])
        labels = np.full(1000, IGNORED)
        right = {number: rank < wins * labelled // 100 for rank, number in enumerate(order)}
        for number, is_other in right.items():
            labels[number] = other[number] if is_other else first[number]
        return choose(given, target_labels=labels)

    even = choice(52, 50)
    assert even.chosen == "source only" and even.needs_labels
    assert "label more of the items on which the candidates disagree" in even.reason
    known = choice(52, 100)
    assert known.chosen == "other" and not known.needs_labels and not known.to_label
    assert "on all 1000 items +0.4 points" in known.reason


def test_candidates_need_no_features() -> None:
    """As in the documentation's example."""
    world, candidates, _ = grid(0)
    plain = [
        Candidate.of(each.name, each.source.logits, each.source.labels, each.target.logits)
        for each in (candidates["source only"], candidates["good"])
    ]
    assert choose(plain, reference_features=world.reference).chosen == "good"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 2]}, "labels from 0 to 1"),
        ({"labels": [0.0, float("nan"), 1.0]}, "labels from 0 to 1"),
        ({"labels": [0, 1]}, "labels of the 3 rows"),
        ({"features": [[1.0]] * 2}, "features of the 3 rows"),
    ],
)
def test_arrays_of_a_candidate_must_belong_together(change: dict[str, Any], message: str) -> None:
    given = {"labels": [0, 1, -100], "features": [[1.0], [2.0], [3.0]], **change}
    logits = [[1.0, 0.0]] * 3
    with pytest.raises(ValueError, match=message):
        Candidate.of("a", logits, given["labels"], logits, given["features"])


def test_outputs_that_are_not_finite_are_dropped() -> None:
    world, candidates, _ = grid(0)
    broken = candidates["good"].target.logits.clone()
    broken[3] = float("nan")
    source = candidates["good"].source
    bad = Candidate.of("bad", source.logits, source.labels, broken)
    choice = choose([candidates["source only"], bad], reference_features=world.reference)
    assert choice.chosen == "source only" and "not finite" in str(choice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("none", "Expected candidates"),
        ("twice", "Several candidates are named source only"),
        ("missing", "baseline 'plain' is not among the candidates source only, good"),
        ("other rows", "good and source only were run on other target items"),
        ("no labels", "source only has no held-out source items with labels"),
        ("reference", "Expected reference_features of the candidates' 600 target items"),
        ("labels", "Expected target_labels from 0 to 1 for the candidates' 600 target items"),
        ("classes", r"and -1 where nobody could tell; got an array of shape \(600,\), \[2"),
        ("names", r"got an array of shape \(600,\), \['good'"),
        ("unknown", r"got an array of shape \(600,\), \[nan"),
    ],
)
def test_what_cannot_be_compared_is_named(change: str, message: str) -> None:
    world, candidates, _ = grid(0)
    given = [candidates["source only"], candidates["good"]]
    options: dict[str, Any] = {"reference_features": world.reference}
    if change == "none":
        given = []
    elif change == "twice":
        given = [given[0], given[0]]
    elif change == "missing":
        options["baseline"] = "plain"
    elif change == "other rows":
        given[1] = Candidate("good", given[1].source, given[1].target.select(torch.arange(99)))
    elif change == "no labels":
        given[0] = Candidate("source only", given[0].source.without_labels, given[0].target)
    elif change in (
        wrong := {
            "labels": [0, 1],
            "classes": np.full(ROWS, 2),
            "names": ["good"] * ROWS,
            "unknown": np.full(ROWS, np.nan),
        }
    ):
        options["target_labels"] = wrong[change]
    else:
        options["reference_features"] = world.reference[:99]
    with pytest.raises(ValueError, match=message):
        choose(given, **options)


# ---- neighbours


def test_neighbour_agreement_is_that_of_the_whole_matrix() -> None:
    world = World(0)
    predictions = world.random.integers(0, 3, ROWS)
    centred = world.reference - world.reference.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -9)
    near = np.argsort(-similarity, axis=1)[:, :7]
    same = (predictions[near] == predictions[:, None]).mean()
    chance = np.square(np.bincount(predictions) / ROWS).sum()
    expected = (same - chance) / (1 - chance)
    for block in (1, 64, 999):
        found = Neighborhoods(world.reference, 7, block=block).agreement(predictions)
        assert found == pytest.approx(expected, abs=1e-6)
    assert neighbor_agreement(np.eye(3)[predictions], world.reference, 7) == pytest.approx(expected)


def test_one_class_and_chance_earn_nothing() -> None:
    world = World(0)
    assert neighbor_agreement(world.labels * 0, world.reference) == 0
    assert abs(neighbor_agreement(world.random.permutation(world.labels), world.reference)) < 0.03
    assert neighbor_agreement(world.labels, world.reference) > 0.3
    few = Neighborhoods(world.reference, max_items=100).agreement(world.labels)
    assert few == pytest.approx(neighbor_agreement(world.labels, world.reference), abs=0.1)


# ---- training and choosing


def make(folder: Path, model: Any = None, **settings: Any) -> Any:
    args = arguments(folder, **settings)

    def make_trainer() -> Trainer:
        return Trainer(
            bert(seed=1) if model is None else copy.deepcopy(model),
            args,
            train_dataset=rows(24, 1),
            eval_dataset=rows(20, 3),
            data_collator=collate,
        )

    return make_trainer


def test_train_and_choose_leaves_the_chosen_weights_in_a_plain_folder(tmp_path: Path) -> None:
    candidates = {"MMD": lambda: [MMD()], "CORAL": lambda: [CORAL()]}
    target = rows(30, 2, None, low=20)
    chosen = train_and_choose(make(tmp_path), target, candidates)
    assert chosen.choice.baseline == "source only"
    assert [each.name for each in chosen.choice.candidates] == ["source only", "MMD", "CORAL"]
    assert json.loads((tmp_path / "choice.json").read_text())["chosen"] == chosen.choice.chosen
    plain = type(chosen.trainer.model).from_pretrained(chosen.folder)
    assert same_bits(weights(plain), weights(chosen.trainer.model))
    saved = {
        name: (tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in candidates
    }

    (tmp_path / "MMD" / "items.npz").unlink()  # as if it had been interrupted there
    again = train_and_choose(make(tmp_path), target, candidates)
    assert again.choice == chosen.choice
    now = {name: (tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in candidates}
    assert now["CORAL"] == saved["CORAL"] and now["MMD"] > saved["MMD"]


def test_labels_of_some_rows_decide_among_what_is_trained(tmp_path: Path) -> None:
    target = rows(240, 2, None, low=20)
    candidates = {"MMD": lambda: [MMD(weight=30.0)]}
    fast = {"learning_rate": 0.005, "max_steps": 6}
    first = train_and_choose(make(tmp_path, **fast), target, candidates)
    classes = []
    for name in ("source_only", "MMD"):
        model = type(first.trainer.model).from_pretrained(tmp_path / name)
        first.trainer.model = model
        classes.append(first.trainer.predict(target).predictions.argmax(1))
    apart = np.flatnonzero(classes[0] != classes[1])
    assert "dropped" not in str(first.choice)
    assert len(apart) >= 5 and sorted(first.to_label) == apart.tolist()

    asked = list(first.to_label)
    labelled = target.select(asked).add_column("labels", classes[1][asked].tolist())
    saved = [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("model.safetensors"))]
    second = train_and_choose(make(tmp_path, **fast), target, candidates, labelled_target=labelled)
    assert second.choice.chosen == "MMD" and second.choice.labels_used == len(asked)
    assert json.loads((tmp_path / "choice.json").read_text())["labels_used"] == len(asked)
    assert not second.to_label  # all are labelled
    now = [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("model.safetensors"))]
    assert now == saved
    for wrong, message in (
        (rows(7, 9, None).add_column("labels", [0] * 7), "7 of the 7 rows of labelled_target are"),
        (target.select(asked), "rows of labelled_target have no labels"),
        (
            target.select(asked).add_column("labels", [7] * len(asked)),
            "is none of the model's classes: Target 7",
        ),
        (
            datasets.concatenate_datasets(
                [
                    labelled,
                    target.select(asked[:1]).add_column("labels", [(classes[1][asked[0]] + 1) % 3]),
                ]
            ),
            "1 rows with two labels each",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train_and_choose(make(tmp_path, **fast), target, candidates, labelled_target=wrong)


def test_rows_are_numbered_as_they_stand(tmp_path: Path) -> None:
    """Whatever the collator wants, and the Trainer sorts; nothing random is drawn."""

    def strict(given: list[Any]) -> Any:
        assert all("labels" in row for row in given)
        return collate(given)

    made = make(tmp_path, **length_grouping())()
    made.data_collator = strict
    target = rows(40, 2, None)
    choice = choose([World(0).candidate(n, 0.5)[0] for n in ("source only", "b")])
    choice = replace(choice, to_label=(3, 1, 2))
    keys = collect_items(made, target, hides_labels=True).keys
    before = torch.get_rng_state()
    chosen = Chosen(made, choice, "", target, keys)
    one_by_one = [row_keys(collate([row])).item() for row in target]
    assert [one_by_one[number] for number in chosen.to_label] == keys[[3, 1, 2]].tolist()
    assert torch.equal(torch.get_rng_state(), before) and made.data_collator is strict
    for other in ([target, target], datasets.IterableDataset.from_generator(lambda: iter(target))):
        assert Chosen(made, choice, "", other, keys).to_label == ()


def test_labels_of_tokens_are_refused(tmp_path: Path) -> None:
    def make_trainer() -> Trainer:
        return Trainer(
            bert("token"),
            arguments(tmp_path, max_steps=2),
            train_dataset=rows(24, 1, "token"),
            eval_dataset=rows(20, 3, "token"),
            data_collator=collate,
        )

    with pytest.raises(ValueError, match="decides among classifiers of rows"):
        train_and_choose(
            make_trainer, rows(30, 2, None), {}, labelled_target=rows(30, 2, "token").select([0, 1])
        )


def test_a_candidate_that_fails_is_left_out_and_one_of_other_settings_is_refused(
    tmp_path: Path,
) -> None:
    class Broken(MMD):
        def loss(self, batch: Any) -> Any:
            return super().loss(batch) * float("nan")

    target = rows(30, 2, None, low=20)
    candidates = {"MMD": lambda: [MMD()], "broken": lambda: [Broken()]}
    chosen = train_and_choose(make(tmp_path), target, candidates)
    verdict = chosen.choice.candidates[-1]
    assert verdict.name == "broken" and not verdict.kept and "NaN" in verdict.reason
    with pytest.raises(ValueError, match="trained with another model"):
        train_and_choose(make(tmp_path, learning_rate=0.5), target, candidates)
    with pytest.raises(ValueError, match="compared on other rows"):
        train_and_choose(make(tmp_path), rows(30, 9, None), candidates)


def test_what_changes_no_weight_may_change_and_what_does_may_not(tmp_path: Path) -> None:
    target = rows(30, 2, None, low=20)

    def candidates(end: float) -> Any:
        return {"MMD": lambda: [MMD(weight=linear_ramp(end_progress=end))]}

    made = train_and_choose(make(tmp_path), target, candidates(0.5))
    quiet = {"disable_tqdm": True, "logging_steps": 7, "dataloader_num_workers": 1}
    assert train_and_choose(make(tmp_path, **quiet), target, candidates(0.5)).choice == made.choice
    with pytest.raises(ValueError, match="settings or adaptations"):
        train_and_choose(make(tmp_path), target, candidates(0.1))
    with pytest.raises(ValueError, match="another model"):
        train_and_choose(make(tmp_path, model=bert(num_hidden_layers=1)), target, candidates(0.5))


def test_an_interrupted_candidate_goes_on_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    target = rows(30, 2, None, low=20)
    whole = train_and_choose(make(tmp_path / "a", **settings), target, {})

    def killed() -> Trainer:
        trainer = make(tmp_path / "b", **settings)()
        trainer.add_callback(Killed())
        return trainer

    with pytest.raises(KeyboardInterrupt):
        train_and_choose(killed, target, {})
    cut = tmp_path / "b" / "source_only" / "checkpoint-9"  # while it was written
    cut.mkdir()
    (cut / "config.json").write_text("{}")
    assert last_whole_checkpoint(cut.parent) == str(cut.parent / "checkpoint-2")
    again = train_and_choose(make(tmp_path / "b", **settings), target, {})
    assert same_bits(weights(again.trainer.model), weights(whole.trainer.model))
    for file in cut.parent.rglob("scheduler.pt"):  # as with save_only_model
        file.unlink()
    assert last_whole_checkpoint(cut.parent) is None


def test_a_candidate_that_does_not_fit_is_left_out_and_may_be_mended(tmp_path: Path) -> None:
    target = rows(30, 2, None, low=20)
    candidates = {"MMD": lambda: [MMD(feature_layer="nope")], "CORAL": lambda: [CORAL()]}
    chosen = train_and_choose(make(tmp_path), target, candidates)
    assert [each.name for each in chosen.choice.candidates] == ["source only", "CORAL", "MMD"]
    assert "nope" in chosen.choice.candidates[-1].reason
    mended = train_and_choose(make(tmp_path), target, {**candidates, "MMD": lambda: [MMD()]})
    assert all("failed" not in each.reason for each in mended.choice.candidates)


def test_target_rows_that_change_are_refused_before_any_training(tmp_path: Path) -> None:
    def drawn(batch: dict[str, list[Any]]) -> dict[str, Any]:
        ids = batch["input_ids"]
        return {**batch, "input_ids": [list(np.random.randint(20, 30, len(x))) for x in ids]}

    with pytest.raises(ValueError, match="others each time they are read"):
        train_and_choose(make(tmp_path), rows(30, 2, None).with_transform(drawn), {})
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        ({"MMD": [MMD()]}, TypeError, "a function that returns new adaptations for 'MMD'"),
        ({"a b": list, "a_b": list}, ValueError, "two have the same folder"),
        ({"source_only": list}, ValueError, "two have the same folder"),
    ],
)
def test_candidates_are_checked_before_any_training(
    candidates: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train_and_choose(make(tmp_path), rows(30, 2, None), candidates)
    assert not list(tmp_path.rglob("model.safetensors"))


def test_frequencies_and_labels_are_checked_before_any_training(tmp_path: Path) -> None:
    target = rows(30, 2, None)
    with pytest.raises(ValueError, match="target_priors names the classes 'x'"):
        train_and_choose(make(tmp_path), target, {}, target_priors={"x": 1.0})
    made = make(tmp_path / "b")()
    made.eval_dataset = made.eval_dataset.remove_columns("labels")
    with pytest.raises(ValueError, match="rows of eval_dataset have no labels"):
        train_and_choose(lambda: made, target, {})
    assert not list(tmp_path.rglob("model.safetensors"))


def test_labels_of_the_target_change_no_choice(tmp_path: Path) -> None:
    candidates = {"MMD": lambda: [MMD()]}
    plain = rows(30, 2, None, low=20)
    poisoned = plain.add_column("labels", [99] * 30)
    one = train_and_choose(make(tmp_path / "a"), plain, candidates)
    other = train_and_choose(make(tmp_path / "b"), poisoned, candidates)
    assert one.choice == other.choice
    assert same_bits(weights(one.trainer.model), weights(other.trainer.model))


def test_held_out_source_rows_are_asked_for(tmp_path: Path) -> None:
    def make_trainer() -> Trainer:
        return Trainer(bert(), arguments(tmp_path), train_dataset=rows(8, 1), data_collator=collate)

    with pytest.raises(ValueError, match="give the Trainer one eval_dataset"):
        train_and_choose(make_trainer, rows(8, 2, None), {})
