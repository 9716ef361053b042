"""Options for scripts: parsed by `HfArgumentParser`, and added to what a script trains."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from transformers import HfArgumentParser

from hf_adapt import alignment, continual, unfreezing
from hf_adapt.arguments import (
    AdaptationArguments,
    AlignmentArguments,
    ContinualArguments,
    MethodArguments,
    UnfreezingArguments,
    adaptations_of,
)
from hf_adapt.engine.constructors import parameters
from tests.helpers.models import SIZE
from tests.scripts.run_glue import main, make_parser
from tests.scripts.world import VOCABULARY, quiet, seeded, sentences, tokenizer

FAMILIES: dict[types.ModuleType, Any] = {
    alignment: AlignmentArguments,
    continual: ContinualArguments,
    unfreezing: UnfreezingArguments,
}
METHODS = [cls for family in FAMILIES for cls in adaptations_of(family).values()]


def parsed(cls: Any, text: str) -> Any:
    return HfArgumentParser(cls).parse_args_into_dataclasses(text.split())[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model's folder, and files of rows: texts, and labels except for the target."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("glue")
    tokenizer().save_pretrained(folder / "model")
    config = BertConfig(vocab_size=VOCABULARY, **SIZE)
    seeded(lambda: BertForSequenceClassification(config)).save_pretrained(folder / "model")
    for name, low in {"train": 0, "target": 30, "memory": 15}.items():
        rows = {"sentence": sentences(16, low), "label": [0, 1] * 8}
        made = datasets.Dataset.from_dict(
            rows if name != "target" else {"sentence": rows["sentence"]}
        )
        made.to_csv(folder / f"{name}.csv")
        made.to_json(folder / f"{name}.jsonl")
        made.to_parquet(folder / f"{name}.parquet")
    settings = quiet(folder / "out", max_steps=2, save_strategy="no", logging_steps=1)
    settings |= {"model_name_or_path": str(folder / "model"), "per_device_train_batch_size": 4}
    return {"train_file": str(folder / "train.csv"), **settings}


def run(world: dict[str, Any], tmp_path: Path, **options: Any) -> dict[str, float]:
    """Run the script with the options in a file; what it has logged first."""
    file = tmp_path / "options.json"
    file.write_text(json.dumps({**world, **options}))
    return dict(main([str(file)]).state.log_history[0])


# ---- what is generated ----


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_each_option_is_an_argument_with_its_help(cls: Any) -> None:
    """Nothing is offered that a constructor would not take, and all that is plain is offered."""
    known, is_open = parameters(cls)
    assert not is_open
    fields = {each.name: each for each in dataclasses.fields(AdaptationArguments)}
    own = {name: each for name, each in fields.items() if name.startswith(f"{cls.name}_")}
    assert {name.removeprefix(f"{cls.name}_") for name in own} <= {*known}
    assert f"{cls.name}_weight" in own or "weight" not in known
    for each in own.values():
        assert each.default is None
        assert each.metadata["help"].startswith(f"{cls.__name__}: ")
    assert known, cls


def test_types_of_options() -> None:
    args = parsed(
        AdaptationArguments,
        "--dann_weight 0.3 --dann_bounded false --dann_hidden_sizes 8 4 --dann_pooling cls "
        "--mmd_scales 0.5 2 --aad_num_neighbours 3 --adaptation MCC Replay "
        "--keep_predictions_on target --averaged_weights_kind soup --unfreezing_every_epochs 0.5",
    )
    assert args.used(alignment) == {
        alignment.AaD: {"num_neighbours": 3},
        alignment.DANN: {"weight": 0.3, "bounded": False, "hidden_sizes": [8, 4], "pooling": "cls"},
        alignment.MCC: {},
        alignment.MMD: {"scales": [0.5, 2.0]},
    }
    assert args.used(continual) == {
        continual.AveragedWeights: {"kind": "soup"},
        continual.KeepPredictions: {"on": "target"},
        continual.Replay: {},
    }
    assert args.used(unfreezing) == {unfreezing.GradualUnfreezing: {"every_epochs": 0.5}}
    assert AdaptationArguments().used(alignment) == {}


@pytest.mark.parametrize("cls", [*FAMILIES.values(), AdaptationArguments])
def test_help_is_that_of_the_docstrings(cls: type[MethodArguments]) -> None:
    text = " ".join(HfArgumentParser(cls).format_help().split())  # type: ignore[arg-type]
    assert "adaptation:" in text  # a group of its own
    assert "default: None" not in text
    for method in cls.methods.values():
        assert method.__name__ in text
    if cls is AlignmentArguments:
        assert "DANN: Peak λ, or a schedule of it; a constant 0 turns the objective off." in text
        assert "MMD: Factors of the median bandwidth, one kernel each. (default: 0.25 0.5" in text
        assert "{uniform,predicted,source,estimate}" in text


def test_data_and_functions_are_left_out() -> None:
    names = {each.name for each in dataclasses.fields(AdaptationArguments)}
    assert not names & {
        "dann_ramp",
        "dann_name",
        "adda_source_model",
        "replay_memory",
        "self_training_view",
        "unfreezing_importance",
        "target_language_modeling_tokenizer",
    }


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_options_survive_a_file(kind: str, tmp_path: Path) -> None:
    first = AdaptationArguments(
        adaptation=["MCC"],
        target_file=["a.csv"],
        target_priors={"ham": 0.8, "spam": 0.2},
        dann_hidden_sizes=[8],
        unfreezing_layer_decay=0.9,
    )
    given = {k: v for k, v in dataclasses.asdict(first).items() if v is not None}
    file = tmp_path / f"options.{kind}"
    file.write_text(json.dumps(given) if kind == "json" else yaml.safe_dump(given))
    parser = HfArgumentParser(AdaptationArguments)  # type: ignore[arg-type]
    read = parser.parse_json_file if kind == "json" else parser.parse_yaml_file
    assert read(str(file)) == (first,)


# ---- in a script ----


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_three_lines_in_run_glue(kind: str, world: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(world["train_file"]).parent
    words = [f"--{name}={value}" for name, value in world.items() if name != "report_to"]
    files = [str(folder / f"target.{kind}"), str(folder / f"memory.{kind}")]
    ours = (
        f"--dann_weight 0.1 --target_file {files[0]} --replay_ratio 0.5 --memory_file {files[1]} "
        "--adaptation InformationMaximization --unfreezing_layer_decay 0.9 --report_to none "
        f"--teacher_name_or_path {folder / 'model'} --temperature 4 --output_dir {tmp_path}"
    )
    trainer = main([*words, *ours.split(), "--target_priors", "{0: 0.8, 1: 0.2}"])
    logs = trainer.state.log_history[0]
    terms = ("dann", "information_maximization", "replay", "distillation", "task")
    assert {f"loss/{name}" for name in terms} | {"unfreezing/phase"} <= {*logs}
    plans = vars(trainer)["_adaptation_plans"]
    made = {each.name: each for plan in plans for each in plan.adaptations}
    assert made["dann"].weight == 0.1
    assert made["distillation"].temperature == 4.0


def test_all_families_and_the_script_parse_together() -> None:
    assert "--teacher_name_or_path" in make_parser().format_help()


# SHOT wants the target in place of the training rows, ContinualMetrics an evaluation by task.
RUNNABLE = {cls.__name__ for cls in METHODS} - {"SHOT", "ContinualMetrics"}


@pytest.mark.parametrize("name", sorted(RUNNABLE))
def test_each_method_runs_with_its_defaults(
    name: str, world: dict[str, Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"adaptation": name, "max_steps": 1}
    folder = Path(world["train_file"]).parent
    if name in adaptations_of(alignment) and name != "SAM":
        options["target_file"] = str(folder / "target.csv")
    elif "memory" in parameters(adaptations_of(continual).get(name, object))[0]:
        options |= {"memory_file": str(folder / "memory.csv"), "memory_size": 6}
    assert "loss" in run(world, tmp_path, **options)


def test_defaults_that_are_said(
    world: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(world["train_file"]).parent
    target, memory = str(folder / "target.csv"), [str(folder / "memory.csv")] * 2
    logs = run(world, tmp_path, target_file=target, memory_file=memory, unfreezing_until="layer.1")
    assert {"loss/self_training", "loss/replay", "unfreezing/phase"} <= {*logs}
    assert "without objectives: using SelfTraining" in caplog.text
    assert "without a method that uses it: using Replay" in caplog.text


def test_a_schedule_by_its_name(world: dict[str, Any], tmp_path: Path) -> None:
    logs = run(world, tmp_path, unfreezing_schedule="LPFT")
    assert logs["unfreezing/trainable_parameters"] == SIZE["hidden_size"] * 2 + 2  # the head
    with pytest.raises((ValueError, OSError), match=r"missing\.yaml"):
        run(world, tmp_path, unfreezing_schedule="missing.yaml")


def test_without_options_nothing_is_changed(world: dict[str, Any], tmp_path: Path) -> None:
    assert not any("/" in key for key in run(world, tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptation": ["DAN"]}, r"'DAN' is unknown. Did you mean DANN\?"),
        ({"dann_weight": 0.1}, "DANN: the target's rows are missing.*--target_file"),
        ({"target_priors": "estimate"}, "target_priors: the target's rows are missing"),
        ({"replay_ratio": 1.0}, "Replay: rows of earlier tasks are missing.*--memory_file"),
        ({"memory_size": 3}, "memory_size: rows of earlier tasks are missing"),
        ({"dann_weight": -1.0, "target_file": "t.csv"}, r"DANN\(weight=-1.0\)"),
        ({"target_file": "missing.csv"}, "missing.csv"),
        ({"temperature": 3.0}, "without a teacher.*--teacher_name_or_path"),
    ],
)
def test_refusals(
    options: dict[str, Any], message: str, world: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(world, tmp_path, **options)


def test_a_domain_column_needs_no_file(world: dict[str, Any], tmp_path: Path) -> None:
    rows = datasets.load_dataset("csv", data_files=world["train_file"], split="train")
    file = tmp_path / "train.csv"
    rows.add_column("domain", ["source", "target"] * 8).to_csv(file)
    assert "loss/mmd" in run(world, tmp_path, train_file=str(file), adaptation=["MMD"])
