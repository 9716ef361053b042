"""The choice among candidates, which may be to keep the model without adaptation."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_adapt.alignment import CORAL, MMD
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.progress import linear_ramp
from hf_adapt.evaluation import Candidate, Neighborhoods, choose, neighbor_agreement
from hf_adapt.evaluation.selection import _decide
from hf_adapt.evaluation.train_and_choose import train_and_choose
from hf_adapt.storage.checkpoints import last_whole_checkpoint
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
    found = {"source only": base, "other": np.tile([1.0, 0.0], 50)}
    found["other"][0] = 1.4  # more on average, but not in two of three samples
    chosen, reason = _decide(order, "source only", found, "neighbors")
    assert chosen == "source only" and "label fifty target rows on which other and" in reason
    found["other"] = base + 0.01
    assert _decide(order, "source only", found, "neighbors")[0] == "other"


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
    inside = 0
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
        assert set(after.to_label) == set(before.to_label[100:])
        good = after.candidates[1].scores["labels"]
        assert good == np.mean((classes[1] == labels)[labels != IGNORED])
        low, high = map(float, re.findall(r"([+-][\d.]+) to ([+-][\d.]+) points", after.reason)[0])
        inside += low < 100 * (accuracy[after.chosen] - accuracy["source only"]) < high
    assert inside >= 6  # of intervals of 95 %


def test_labels_of_items_on_which_all_agree_decide_nothing() -> None:
    world, candidates, _ = grid(0)
    given = [candidates["source only"], candidates["good"]]
    options = {"reference_features": world.reference}
    plain = choose(given, **options)
    agreed = sorted(set(range(ROWS)) - set(plain.to_label))
    again = choose(given, **options, target_labels=some_labels(world, agreed))
    assert (again.chosen, again.to_label, again.labels_used) == (plain.chosen, plain.to_label, 0)
    few = choose(given, **options, target_labels=some_labels(world, list(plain.to_label[:4])))
    assert few.labels_used == 0 and "Labels of 4 items on which candidates disagree" in few.reason


def test_labels_may_leave_source_only_in_place() -> None:
    world = World(0)
    base, other = world.candidate("source only", 1.0)[0], world.candidate("other", 0.4)[0]
    labels = some_labels(world, list(choose([base, other]).to_label[:40]))
    assert choose([base, other], target_labels=labels).chosen == "source only"
    found = {"source only": np.tile([0.0, 1.0], 50), "other": np.tile([1.0, 0.0], 50)}
    found["other"][1] = 1.0  # one item more
    chosen, reason = _decide(["other", "source only"], "source only", found, "labels", 0.5)
    assert chosen == "source only" and "label more target rows on which other and" in reason


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
        ("classes", "and -100 where there is none; got 600, of \\[2\\]"),
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
    elif change in ("labels", "classes"):
        options["target_labels"] = [0, 1] if change == "labels" else np.full(ROWS, 2)
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
        (rows(7, 9, None).add_column("labels", [0] * 7), "Of the 7 items of labelled_target 7 are"),
        (target.select(asked), "rows of labelled_target have no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            train_and_choose(make(tmp_path, **fast), target, candidates, labelled_target=wrong)


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
