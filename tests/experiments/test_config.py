"""Configurations: what they hold, and where an error says that something is wrong."""

from pathlib import Path
from typing import Any

import pytest

from hf_adapt.alignment import DANN, MMD
from hf_adapt.cli.run_options import experiment, split_arguments
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.methods import shifted
from hf_adapt.experiments.settings import ConfigError, Settings

GOOD = """\
data:
  a: a.csv
  b: {train: b.csv, test: c.csv, text_column: review}
methods:
  source only: []
  DANN: [DANN]
  both: [MMD, {DANN: {weight: {linear_ramp: {end_value: 0.5}}, ramp: null}}]
  priors: {adaptations: recommended, target_priors: given, stream: {ratio: 0.5}}
  bound: target
seeds: 2
training: {learning_rate: 3e-4}
"""


def read(text: str, **flags: Any) -> Experiment:
    return Experiment.read(Settings.parse(text, "config.yaml"))


def test_a_configuration_is_read_and_methods_are_built() -> None:
    found = read(GOOD)
    assert found.pairs == [("a", "b"), ("b", "a")] and found.seeds == [42, 43]
    assert found.data["b"].test == "c.csv" and found.data["b"].text_column == "review"
    assert found.training["learning_rate"] == 3e-4  # YAML 1.1 has a text there
    mmd, dann = found.methods["both"].build(list)
    assert isinstance(mmd, MMD) and isinstance(dann, DANN)
    assert dann.lambda_at(0.5) == 0.25
    assert found.methods["both"].build(list)[0] is not mmd
    assert [m for m, method in found.methods.items() if method.is_baseline] == ["source only"]
    assert [m for m, method in found.methods.items() if method.is_bound] == ["bound"]
    assert found.methods["priors"].stream == {"ratio": 0.5}


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("seeds: 2", "sedes: 2", 10, "'sedes' is unknown. Did you mean seeds?"),
        ("seeds: 2", "seeds: two", 10, "expected a number of seeds"),
        ("seeds: 2", "num_train: many", 10, "num_train: expected a whole number, got 'many'"),
        ("seeds: 2", "balanced: 1", 10, "balanced: expected true or false, got 1"),
        ("seeds: 2", "max_length: -1", 10, "must not be negative"),
        ("seeds: 2", "task: tagging", 10, "'tagging' is unknown"),
        ("seeds: 2", "pairs: [[a, c]]", 10, "the domain 'c' is unknown"),
        ("seeds: 2", "pairs: [[a, b, a]]", 10, "expected [source, target]"),
        ("seeds: 2", "data: {}", 10, "stands here a second time"),
        ("test: c.csv", "tset: c.csv", 3, "'tset' is unknown. Did you mean test?"),
        ("[DANN]", "[DAN]", 6, "'DAN' is unknown. Did you mean DANN?"),
        ("[DANN]", "DANN", 6, "must be a list"),
        ("[DANN]", "{DANN: {}}", 6, "write a list, [DANN: …]"),
        ("[DANN]", "[{DANN: {wieght: 1}}]", 6, "'wieght' is unknown. Did you mean weight?"),
        ("[DANN]", "[{DANN: {learning_rate: -1}}]", 6, "must be positive"),
        ("end_value", "stop", 7, "linear_ramp: the argument 'stop' is unknown"),
        ("[DANN]", "{first: [DAN], adaptations: [SHOT]}", 6, "Did you mean DANN?"),
        ("[DANN]", "[SHOT]", 6, "SHOT has no source, and trains on the target's rows"),
        ("[DANN]", "{train_on: unlabelled}", 6, "rows without labels need an adaptation"),
        ("[DANN]", "{train_on: sauce}", 6, "train_on must be source, target or unlabelled"),
        ("stream:", "strem:", 8, "'strem' is unknown. Did you mean stream?"),
        ("{ratio: 0.5}", "{ratoi: 0.5}", 8, "'ratoi' is unknown. Did you mean ratio?"),
        ("learning_rate:", "learnin_rate:", 11, "Did you mean learning_rate?"),
        ("learning_rate:", "seed:", 11, "training: seed is set by each run"),
        ("training: {", "training: {{", 12, ""),
        ("seeds: 2", "pairs: [[a, a]]", 10, "paired with itself"),
        ("seeds: 2", "pairs: [[a, b], [a, b]]", 10, "stands here a second time"),
        ("seeds: 2", "seeds: [42, 42]", 10, "42 stands here a second time"),
        ("seeds: 2", "seeds: [1, -1]", 10, "-1 must not be negative"),
        ("seeds: 2", "max_length: 0", 10, "max_length: 0 leaves nothing"),
        ("seeds: 2", "num_train: 0", 10, "num_train: 0 leaves nothing"),
        ("seeds: 2", "task: [a]", 10, "task: expected a text"),
        ("{learning_rate: 3e-4}", "x", 11, "training must hold TrainingArguments by name, got 'x'"),
        ("{learning_rate: 3e-4}", "0", 11, "got 0"),
        ("learning_rate: 3e-4", "max_steps: many", 11, "max_steps: expected a whole number"),
        ("learning_rate: 3e-4", "learning_rate: x", 11, "learning_rate: expected a number"),
        ("learning_rate: 3e-4", "bf16: 1", 11, "bf16: expected true or false"),
        ("{ratio: 0.5}", "0.5", 8, "stream must hold options by name, got 0.5"),
        ("{ratio: 0.5}", "[]", 8, "stream must hold options by name, got []"),
        ("[DANN]", "{pretrain: 10}", 6, "pretrain must hold options by name, got 10"),
        ("[DANN]", "{pretrain: {epochs: 1}}", 6, "training: the argument 'epochs' is unknown"),
        ("[DANN]", "{first: {training: {max_steps: x}}}", 6, "max_steps: expected"),
        ("[DANN]", "recomended", 6, "Did you mean recommended?"),
        ("[DANN]", "[{MMD: {}, DANN: {}}]", 6, "write [{MMD: …}, {DANN: …}]"),
        ("[DANN]", "{adaptations: [SAM], stream: {ratio: 2}}", 6, "no adaptation that reads"),
        ("[DANN]", "{adaptations: [DANN], target_priors: given}", 6, "no adaptation that uses"),
        ("target_priors: given", "target_priors: givn", 8, "Did you mean given?"),
        ("target_priors: given", "target_priors: 0.5", 8, "frequency of each class by name: 0.5"),
        ("target_priors: given", "target_priors: {given: x}", 8, "expected numbers, got 'x'"),
        ("target_priors: given", "target_priors: {a: 30, b: 70}", 8, "add up to 100"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    before: str, after: str, line: int, message: str
) -> None:
    assert before in GOOD
    with pytest.raises(ConfigError) as caught:
        read(GOOD.replace(before, after))
    assert str(caught.value).startswith(f"config.yaml:{line}: ")
    assert message in str(caught.value)


def test_names_may_look_like_numbers_or_truth_values() -> None:
    """YAML 1.1 reads `no` and `1` as other things; `target_priors` may be inherited by `<<`."""
    found = read(
        "data: {no: a.csv, 1: b.csv, 01: c.csv}\npairs: [[no, 1], [01, no]]\n"
        "methods:\n  on: &im {adaptations: [InformationMaximization], "
        "target_priors: {1: 0.5, yes: 0.3, 1.0: 0.2}}\n  2: {<<: *im, save: yes}\n"
    )
    assert list(found.data) == ["no", "1", "01"] and list(found.methods) == ["on", "2"]
    assert found.pairs == [("no", "1"), ("01", "no")]
    assert found.methods["2"].target_priors == {"1": 0.5, "yes": 0.3, "1.0": 0.2}
    assert found.methods["2"].save


@pytest.mark.parametrize("spec", ["[]", "{adaptations: []}", "{pretrain: false}", "{stream: null}"])
def test_a_method_of_nothing_is_the_baseline(spec: str) -> None:
    assert read(f"data: {{a: a, b: b}}\nmethods: {{x: {spec}}}").methods["x"].is_baseline


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: 1\nb: é".encode("latin-1"), ":2: this is not UTF-8"), (b"a: 1\n\nb: \0", ":3: the char")],
)
def test_a_file_of_other_bytes(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Settings.read(tmp_path / "config.yaml")


def test_the_output_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "there")
    found = read(f"{GOOD}output_dir: ~/${{PLACE}}\n")
    assert found.output_dir == str(Path("~/there").expanduser())


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Settings.read(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="must hold keys"):
        Settings.parse("- a", "x.yaml")
    with pytest.raises(ConfigError, match="data: is missing"):
        read("methods: {a: []}")


def test_paths_start_at_the_file_and_variables_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").touch()
    monkeypatch.setenv("ROWS", str(tmp_path / "rows"))
    text = GOOD.replace("b.csv", "'${ROWS}/b.csv'")
    found = Experiment.read(Settings.parse(text, "config.yaml"), tmp_path)
    assert found.data["a"].train == str(tmp_path / "a.csv")
    assert found.data["b"].train == str(tmp_path / "rows" / "b.csv")


# ---------------------------------------------------------------- the command line
@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(GOOD)
    return str(tmp_path / "config.yaml")


def test_options_replace_keys(file: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").touch()
    flags = {
        "num_train": 7,
        "seeds": "5,6",
        "method": ["bound", "DANN", "priors"],
        "pair": ["b:a"],
        "text_column": "words",
        "target_priors": "{1: 0.5, yes: 0.5}",
    }
    found = experiment(file, flags, {"max_steps": 3})
    assert (found.num_train, found.seeds, found.pairs) == (7, [5, 6], [("b", "a")])
    assert list(found.methods) == ["bound", "DANN", "priors"]
    assert found.methods["priors"].target_priors == {"1": 0.5, "yes": 0.5}
    assert found.methods["DANN"].target_priors is found.methods["bound"].target_priors is None
    assert found.training["max_steps"] == 3 and found.training["learning_rate"] == 3e-4
    assert found.text_column == "words"
    assert {domain.text_column for domain in found.data.values()} == {None}
    assert found.output_dir == str(Path("runs", "config"))
    own = experiment(file, {"source": "a", "target": str(tmp_path / "c.csv")}, {})
    assert own.pairs == [("a", "c")] and list(own.methods) == list(read(GOOD).methods)
    assert list(own.data) == ["a", "c"]


@pytest.mark.parametrize(
    ("name", "names"),
    [("rows", ("rows", "target")), ("target", ("target", "target rows")), ("1", ("1", "target"))],
)
def test_two_files_of_the_same_name_are_two_domains(name: str, names: tuple[str, str]) -> None:
    found = experiment(None, {"source": f"x/{name}.csv", "target": f"y/{name}.csv"}, {})
    assert found.pairs == [names]
    assert [found.data[each].train for each in names] == [f"x/{name}.csv", f"y/{name}.csv"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "Give --source and --target"),
        ({"source": "a.csv"}, "--source is given alone"),
        ({"source": "a", "target": "b", "seeds": "x"}, "--seeds x: expected"),
        ({"source": "a", "target": "b", "seeds": ""}, "--seeds '': expected"),
        ({"source": "a", "target": "b", "seeds": "1,1"}, "^--seeds: seeds: 1 stands"),
        (
            {"source": "a", "target": "b", "method": ["source only"], "target_priors": "uniform"},
            "--target-priors: no method has an adaptation that uses",
        ),
        ({"source": "a", "target": "a"}, "--source and --target are both 'a'"),
        ({"source": "a", "target": "b", "target_priors": "{x: 2}"}, "^--target-priors: .* up to 2"),
        ({"source": "a", "target": "b", "num_train": -1}, "^--num-train: num_train: -1"),
        ({"source": "a", "target": "b", "method": ["DAN"]}, "--method 'DAN' is unknown"),
    ],
)
def test_wrong_options_are_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(None, flags, {})


def test_options_of_training_arguments() -> None:
    words = ["--max_steps", "2", "--learning-rate=3e-4", "--bf16", "--lr_scheduler_type", "linear"]
    assert split_arguments("c.yaml", words, []) == (
        "c.yaml",
        {"max_steps": 2, "learning_rate": 3e-4, "bf16": True, "lr_scheduler_type": "linear"},
    )
    assert split_arguments("--max_steps", ["2", "c.yaml"], [])[0] == "c.yaml"
    with pytest.raises(ConfigError, match=r"--num_trian is unknown. Did you mean --num-train\?"):
        split_arguments("--num_trian", ["3"], ["num_train"])
    with pytest.raises(ConfigError, match="one argument too many"):
        split_arguments("a.yaml", ["b.yaml"], [])


def test_wrong_frequencies_still_add_up_to_one() -> None:
    shares = {"a": 0.7, "b": 0.2, "c": 0.1}
    for points in (-0.8, -0.1, 0.1, 0.5):
        wrong = shifted(shares, points)
        assert sum(wrong.values()) == pytest.approx(1)
        assert all(0 < share < 1 for share in wrong.values())
        assert wrong["b"] == pytest.approx(2 * wrong["c"])
