"""The plan: printed, predicted, saved, edited and given back."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer
from typer.testing import CliRunner

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.cli import app
from hf_adapt.unfreezing import (
    LPFT,
    Phase,
    Plateau,
    RandomLayers,
    UnfreezingPlan,
    layer_groups,
    unfreezing_plan,
)
from hf_adapt.unfreezing.costs import group_costs, phase_cost
from hf_adapt.unfreezing.phases import Clock
from hf_adapt.unfreezing.plan import group_patterns
from tests.helpers.data import collate, rows
from tests.helpers.models import bert, llama, llama_config
from tests.helpers.trainers import arguments, same_bits, weights


def test_a_plan_is_printed_with_steps_sizes_and_predictions() -> None:
    model = bert(num_hidden_layers=12)
    text = str(unfreezing_plan(model, max_steps=140))
    lines = text.splitlines()
    assert re.match(r"phase +starts at +trains +parameters +time +memory +activations", lines[0])
    assert re.match(r"0 +step 0 +head +51 ", lines[1])
    assert re.match(r"1 +step 10 \(7.14% of the run\) +layer.11, head ", lines[2])
    everything = sum(p.numel() for p in model.parameters())
    assert re.match(rf"13 .* everything +{everything:,} +100% +100% +100%", lines[14])


def test_the_predicted_time_is_the_formula() -> None:
    """F + B (1 - k / L) with B = 2 F, for a model that is nearly all layers."""
    model = bert(num_hidden_layers=12, hidden_size=32, intermediate_size=128)
    groups = layer_groups(model)
    costs = group_costs(model, groups)
    names = [group.name for group in groups]
    for k in (0, 3, 6, 9, 11):
        trained = frozenset(
            n for n in names if n not in ["embeddings", *(f"layer.{i}" for i in range(k))]
        )
        assert phase_cost(costs, trained).time == pytest.approx(
            1 / 3 + 2 / 3 * (1 - k / 12), abs=0.02
        )


def test_a_block_below_frozen_ones_still_needs_their_backward() -> None:
    costs = group_costs(bert(num_hidden_layers=4), layer_groups(bert(num_hidden_layers=4)))
    lower, upper = (phase_cost(costs, frozenset([n])).time for n in ("layer.0", "layer.3"))
    everything = phase_cost(costs, frozenset(costs)).time
    assert upper < lower < everything == 1.0


def test_the_memory_is_that_of_weights_gradients_and_moments() -> None:
    costs = group_costs(bert(), layer_groups(bert()))
    total = sum(cost.parameters for cost in costs.values())
    head = costs["head"].parameters
    assert phase_cost(costs, frozenset(["head"])).memory == pytest.approx(
        (total + 3 * head) / (4 * total)
    )


def test_a_tied_output_layer_costs_its_product_after_all() -> None:
    tied = LlamaForCausalLM(llama_config(intermediate_size=8, tie_word_embeddings=True))
    costs = group_costs(tied, layer_groups(tied))
    assert max(costs.values(), key=lambda c: c.level).work > 64 * 16


def test_the_length_of_a_run_is_read_from_arguments_and_data(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2)
    plan = unfreezing_plan(bert(), args, every_epochs=0.5, train_dataset=rows(30, 1))
    assert plan.clock.max_steps == 12 and plan.clock.steps_per_epoch == 4  # 8 batches, 2 a step
    assert [plan.clock.step_of(p.at) for p in plan.phases] == [0, 2, 4, 6]
    trainer = Trainer(bert(), args, train_dataset=rows(30, 1), data_collator=collate)
    trainer.train()
    assert trainer.state.max_steps == 12
    assert unfreezing_plan(bert(), args).clock is None
    assert unfreezing_plan(bert(), arguments(tmp_path, max_steps=7)).clock.max_steps == 7


def test_groups_are_written_as_few_modules() -> None:
    model = bert()
    patterns = group_patterns(model, layer_groups(model))
    assert patterns == {
        "embeddings": ("bert.embeddings",),
        "layer.0": ("bert.encoder.layer.0",),
        "layer.1": ("bert.encoder.layer.1", "bert.pooler"),
        "head": ("classifier",),
    }


PLANS: dict[str, Any] = {
    "gradual": lambda model: unfreezing_plan(model, layer_decay=0.5, rewarm_steps=2),
    "steps": lambda model: unfreezing_plan(model, every_steps=2),
    "lp_ft": lambda model: unfreezing_plan(model, schedule=LPFT("1 epoch")),
    "plateau": lambda model: unfreezing_plan(model, schedule=Plateau("eval_loss", patience=3)),
    "random": lambda model: unfreezing_plan(
        model, schedule=RandomLayers(num_layers=1, every_steps=2), max_steps=8
    ),
    "phases": lambda model: unfreezing_plan(model, schedule=[Phase(0, "head"), Phase(3, ".*")]),
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("build", [bert, llama])
def test_a_plan_survives_its_file(kind: str, build: Any, tmp_path: Path) -> None:
    model = build()
    if build is llama and kind == "phases":
        model = bert("token")
    plan = PLANS[kind](model)
    plan.save(tmp_path / "sub" / "plan.yaml")
    loaded = UnfreezingPlan.load(tmp_path / "sub" / "plan.yaml")
    assert loaded.groups == plan.groups
    groups = loaded.bind(model)
    assert loaded.trained(groups) == plan.trained(groups)
    assert [str(p.at) for p in loaded.phases] == [str(p.at) for p in plan.phases]
    assert loaded.lr_multipliers == pytest.approx(plan.lr_multipliers)
    assert loaded.rewarm_steps == plan.rewarm_steps
    rules = [
        p.plateau and (p.plateau.metric, p.plateau.patience, p.plateau.min_delta)
        for p in (plan, loaded)
    ]
    assert rules[0] == rules[1]


def test_small_rates_survive_the_file(tmp_path: Path) -> None:
    plan = unfreezing_plan(bert(num_hidden_layers=24), layer_decay=1 / 2.6)
    plan.save(tmp_path / "plan.yaml")
    loaded = UnfreezingPlan.load(tmp_path / "plan.yaml")
    assert min(plan.lr_multipliers.values()) < 1e-10
    assert loaded.lr_multipliers == pytest.approx(plan.lr_multipliers, rel=1e-9, abs=0.0)


def test_memory_counts_the_weights_under_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2))
    plan = unfreezing_plan(model)
    everything = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = plan.costs["head"].parameters
    first = plan.phase_costs()[0]
    assert first.memory == pytest.approx((everything + 3 * head) / (everything + 3 * trainable))


def trained_with(schedule: Any, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    trainer = Trainer(
        bert(), arguments(folder, max_steps=8), train_dataset=rows(32, 1), data_collator=collate
    )
    trainer.add_callback(GradualUnfreezingCallback(schedule, **options))
    trainer.train()
    return weights(trainer.model)


def test_a_plan_given_back_is_the_same_run(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(layer_decay=0.5, rewarm_steps=2)
    direct = trained_with(None, tmp_path, **options)
    plan = unfreezing_plan(bert(), **options)
    plan.save(tmp_path / "plan.yaml")
    assert same_bits(direct, trained_with(plan, tmp_path))
    assert same_bits(direct, trained_with(str(tmp_path / "plan.yaml"), tmp_path))
    text = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(text.replace("at: 25%", "at: 3"))
    assert not same_bits(direct, trained_with(tmp_path / "plan.yaml", tmp_path))


def test_a_plan_and_options_contradict() -> None:
    plan = unfreezing_plan(bert())
    with pytest.raises(ValueError, match="layer_decay and a plan were given"):
        GradualUnfreezingCallback(plan, layer_decay=0.5)


KEY = "lr_multipliers:\n"
GOOD = """\
groups:
  embeddings: [bert.embeddings]
  layers: [bert.encoder, bert.pooler]
  head: [classifier]
phases:
- at: 0
  train: [head]
- at: 50%
  add: [layers]
lr_multipliers:
  layers: 0.5
"""


def test_the_good_file_is_good(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(GOOD)
    plan = UnfreezingPlan.load(tmp_path / "plan.yaml")
    assert plan.phases[1].train == ("layers", "head") and plan.lr_multipliers == {"layers": 0.5}


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        (
            "phases:",
            "rates:",
            5,
            "'rates' is no key of the plan. It is called 'lr_multipliers' now",
        ),
        ("phases:", "phasess:", 5, "'phasess' is no key of the plan. Did you mean 'phases'"),
        ("  train: [head]", "  trian: [head]", 7, "'trian' is no key of a phase. Did you mean"),
        ("train: [head]", "train: [haed]", 7, "'haed' is no group. Did you mean 'head'"),
        ("add: [layers]", "add: [layer]", 9, "'layer' is no group. Did you mean 'layers'"),
        ("add: [layers]", "add: ['(']", 9, "is not a regular expression"),
        ("  layers: 0.5", "  layer: 0.5", 11, "'layer' is no group. Did you mean 'layers'"),
        ("layers: 0.5", "layers: fast", 11, "expected a factor of 0 or more, got 'fast'"),
        ("layers: 0.5", "layers: -1", 11, "expected a factor of 0 or more, got -1"),
        ("at: 50%", "at: soon", 8, "'soon' is not a moment of training"),
        ("- at: 0\n  train", "- at: 0\n  add", 6, "the first phase has nothing to `add:` to"),
        ("- at: 0\n  train: [head]", "- at: 0", 6, "a phase needs `at:` and one of"),
        ("train: [head]", "train: {head: 1}", 7, "expected a name or a list of names"),
        (KEY, f"rewarm_steps: many\n{KEY}", 10, "expected a whole number of steps"),
        (KEY, f"plateau: {{patiense: 2}}\n{KEY}", 10, "Did you mean 'patience'"),
        (KEY, f"plateau: {{metric: 5}}\n{KEY}", 10, "expected the name of a metric, got 5"),
        (KEY, f"plateau: {{greater_is_better: 'no'}}\n{KEY}", 10, "expected true, false"),
        ("at: 50%\n", "at: plateau\n  add: [layers]\n- at: 60%\n", 10, "the phase before waits"),
        (KEY, f"plateau: {{patience: 0}}\n{KEY}", 10, "patience >= 1"),
        ("  head: [classifier]", "  layers: [classifier]", 4, "'layers' stands here twice"),
        ("groups:\n", "groups: [\n", None, "this is not YAML"),
    ],
)
def test_a_wrong_file_names_the_line(
    before: str, after: str, line: int | None, message: str, tmp_path: Path
) -> None:
    assert before in GOOD
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD.replace(before, after, 1))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        UnfreezingPlan.load(path)
    where = f"{path}, line " + ("" if line is None else f"{line}:")
    assert str(error.value).startswith(where)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("groups: {a: b}\nphases: []\n", "line 2: the schedule is empty"),
        ("groups: {}\nphases: [{at: 0, train: a}]\n", "line 1: `groups:` is empty"),
        ("groups: {a: b}\n", "the plan has no `phases:`"),
        ("just words\n", "expected `key: value` lines"),
    ],
)
def test_an_incomplete_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        UnfreezingPlan.load(path)


# ---- the command line ----


def test_the_command_prints_a_plan_and_writes_it(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "model")
    out = tmp_path / "plan.yaml"
    done = CliRunner().invoke(
        app,
        [
            "schedule",
            str(tmp_path / "model"),
            "--steps",
            "80",
            "--layer-decay",
            "0.5",
            "-o",
            str(out),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "step 20 (25% of the run)" in done.output
    assert UnfreezingPlan.load(out).lr_multipliers == {
        "embeddings": 0.125,
        "layer.0": 0.25,
        "layer.1": 0.5,
    }
    assert len(trained_with(out, tmp_path)) > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--task", "token-classification"], "head"),
        (["--preset", "lp-ft", "--switch", "30%"], "30%"),
        (["--every-epochs", "0.5"], "0.5 epochs"),
        (["--every-epochs", "0.5", "--steps", "100"], "0.5 epochs"),
        (["--direction", "bottom_up", "--until", "layer.0"], "embeddings"),
    ],
)
def test_the_command_s_options(options: list[str], expected: str, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["schedule", str(tmp_path / "model"), *options])
    assert done.exit_code == 0, done.output
    assert expected in done.output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--until", "layer.9"], "There is no layer group 'layer.9'"),
        (["--every-steps", "50", "--steps", "100"], "beyond the last of the run's 100"),
        (["--task", "none", "--preset", "lp-ft"], "There is no layer group"),
        (["--preset", "lp-ft", "--every-steps", "5"], "does not take --every-steps"),
        (["--switch", "30%"], "does not take --switch"),
    ],
)
def test_the_command_s_errors_are_one_message(
    options: list[str], expected: str, tmp_path: Path
) -> None:
    bert().save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["schedule", str(tmp_path / "model"), *options])
    assert done.exit_code == 1
    assert "Error:" in done.stderr and expected in done.stderr


# ---- files that only a run can judge ----


@pytest.mark.parametrize(
    ("before", "after", "where", "message"),
    [
        (
            "- at: 50%",
            "- at: 60%\n  add: [layers]\n- at: 40%",
            "line 10: ",
            "in the order in which",
        ),
        ("- at: 50%", "- at: 9\n  add: [layers]\n- at: 50%", "line 10: ", "in the order in which"),
        ("- at: 50%", "- at: 99", "line 8: ", "beyond the last of the run's 16"),
        ("- at: 50%", "- at: 1 epoch", "line 8: ", "the training set has no length"),
        ("- at: 0", "- at: 3", "line 6: ", "nothing would train before"),
        ("- at: 50%", "- at: plateau", "line 8: ", "the plan has no `plateau:` rule"),
        ("[classifier]", "[clasifier]", "", "clasifier"),
        ("  head: [classifier]", "  head: [classifier, bert.pooler]", "", "pooler"),
    ],
)
def test_what_is_wrong_for_a_model_or_a_run_names_the_file_and_the_line(
    before: str, after: str, where: str, message: str, tmp_path: Path
) -> None:
    assert before in GOOD
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD.replace(before, after, 1))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        plan = unfreezing_plan(bert(), schedule=path, max_steps=16)
        plan.timeline(plan.bind(bert()), Clock(16))  # as a run on a stream does
    assert str(error.value).startswith(f"{path}, {where}" if where else f"{path}: ")


def test_where_a_plan_was_read_from_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD)
    plan = UnfreezingPlan.load(path)
    assert plan == UnfreezingPlan(plan.groups, plan.phases, plan.lr_multipliers)
    assert str(path) not in repr(plan)
    plan.phases.append(Phase("70%", "head"))  # edited since, whose line is unknown
    plan.phases.append(Phase("60%", "head"))
    with pytest.raises(ValueError, match=r"^The phase at 60%"):
        plan.timeline(plan.bind(bert()), Clock(16))
