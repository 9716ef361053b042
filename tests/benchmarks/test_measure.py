"""What every benchmark measures with: clocks, ratios in turns, memory, processes and tables."""

import json

import pytest
import torch
from measure import Clock, in_fresh_process, in_turns, print_table, ratio
from transformers import BertForSequenceClassification, TrainerCallback
from workload import bert, random_rows, step_seconds

from hf_adapt.experiments.memory import peak, resident, restarted_peak
from hf_adapt.experiments.tables import markdown


def test_the_median_is_that_of_the_steps_after_the_warm_up():
    clock = Clock()
    clock.ticks = [0.0, 9.0, 10.0, 12.0, 15.0]
    assert clock.median(warm_up=1) == 2.0


def test_a_run_has_a_tick_for_its_start_and_for_each_step():
    clock = Clock()
    model = bert(BertForSequenceClassification, 1, 32)
    seen = []

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    threads = torch.get_num_threads()
    seconds = step_seconds(model, random_rows(8, 4), 2, 3, 1, clock=clock, callbacks=[Steps()])
    assert torch.get_num_threads() == threads
    assert seen == [1, 2, 3, 4]
    assert len(clock.ticks) == 5 and clock.ticks == sorted(clock.ticks)
    assert 0 < seconds == clock.median(1)


def test_sides_take_turns_and_the_first_one_changes(capsys):
    order = []

    def side(name):
        return lambda: order.append(name) or float(len(order))

    found = in_turns({"a": side("a"), "b": side("b")}, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    assert capsys.readouterr().out == ""  # progress is not among the results


def test_a_ratio_is_the_median_of_the_rounds_and_has_quartiles():
    line = ratio("a / b", [1.0, 4.0, 3.0, 8.0, 5.0], [1.0, 2.0, 1.0, 2.0, 1.0])
    assert line == {"comparison": "a / b", "ratio": "3.000", "quartiles": "2.000–4.000"}


def test_peak_memory_counts_from_its_restart():
    before = restarted_peak("cpu")
    if before is None:
        pytest.skip("the peak cannot be restarted on this system")
    held = torch.ones(25_000_000)
    assert 90e6 < peak("cpu") - before < 200e6
    del held
    assert abs(restarted_peak("cpu") - resident()) < 50e6


def test_a_fresh_process_gives_back_its_last_line(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\n"
        "print('not this')\n"
        "print(json.dumps([sys.argv[1:], os.environ['KIND']]))\n"
    )
    assert in_fresh_process(str(script), "--rows", 3, environment={"KIND": "child"}) == [
        ["--rows", "3"],
        "child",
    ]
    script.write_text("raise ValueError('no such file')")
    with pytest.raises(SystemExit, match="no such file"):
        in_fresh_process(str(script))


def test_tables_have_every_column_and_a_dash_where_there_is_no_cell(capsys):
    print_table([{"method": "ours", "MB": 1234}, {"method": "theirs", "ratio": "1.5"}])
    assert capsys.readouterr().out.strip().splitlines() == [
        "| method | MB | ratio |",
        "| --- | --- | --- |",
        "| ours | 1,234 | – |",
        "| theirs | – | 1.5 |",
    ]
    assert markdown([["a"], ["1"]]) == "| a |\n| --- |\n| 1 |"
    assert json.dumps(random_rows(2, 3).to_dict()) == json.dumps(random_rows(2, 3).to_dict())
