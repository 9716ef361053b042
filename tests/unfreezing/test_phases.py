import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adapt.unfreezing.phases import Clock, Moment, Phase, Timeline


@pytest.mark.parametrize(
    ("written", "amount", "unit"),
    [
        (120, 120, "step"),
        ("120", 120, "step"),
        ("120 steps", 120, "step"),
        ("25%", 25.0, "percent"),
        ("14.285714 %", 14.285714, "percent"),
        ("1.5 epochs", 1.5, "epoch"),
        ("1 epoch", 1.0, "epoch"),
        ("plateau", 0, "plateau"),
        (Moment(3), 3, "step"),
    ],
)
def test_a_moment_is_read_as_a_person_writes_it(written, amount, unit):
    moment = Moment.parse(written)
    assert (moment.amount, moment.unit) == (amount, unit)
    assert Moment.parse(str(moment)) == moment


@pytest.mark.parametrize("written", [-1, True, 0.5, "half", "25 %%", "1.5", "", None])
def test_what_is_no_moment_is_refused(written):
    with pytest.raises(ValueError, match="is not a moment of training"):
        Moment.parse(written)


def test_the_end_of_the_run_is_no_start():
    with pytest.raises(ValueError, match="expected less than 100%"):
        Moment.parse("100%")


@given(st.integers(1, 2000), st.integers(1, 30))
def test_even_phases_survive_being_written_and_start_inside_the_run(max_steps, number):
    clock = Clock(max_steps)
    for i in range(number):
        moment = Moment(100 * i / number, "percent")
        step = clock.step_of(moment)
        assert step == clock.step_of(Moment.parse(str(moment)))
        assert 0 <= step < max_steps
        assert abs(step - i * max_steps / number) <= 1


@given(st.integers(1, 200), st.integers(1, 12))
def test_shares_of_an_epoch_survive_being_written(per_epoch, parts):
    clock = Clock(10**6, float(per_epoch))
    for i in range(parts):
        moment = Moment(i / parts, "epoch")
        assert clock.step_of(moment) == clock.step_of(Moment.parse(str(moment)))


def test_epochs_are_counted_in_optimizer_steps():
    assert Clock(100, 25.0).step_of(Moment.parse("1.5 epochs")) == 38


def test_epochs_of_a_stream_are_refused():
    with pytest.raises(ValueError, match=r"after 1 epoch, but the training set has no length"):
        Clock(100).step_of(Moment.parse("1 epoch"))


@pytest.mark.parametrize("written", [100, 250, "4 epochs"])
def test_a_phase_beyond_the_last_step_is_refused(written):
    with pytest.raises(ValueError, match=r"beyond the last of the run's 100 optimizer steps"):
        Clock(100, 25.0).step_of(Moment.parse(written))


def test_a_phase_takes_one_group_or_many():
    assert Phase(0, "head").train == ("head",)
    assert Phase(0, ["head", "norm"]).train == ("head", "norm")


A, B, C = frozenset("a"), frozenset("ab"), frozenset("c")


def test_the_phase_of_a_step():
    timeline = Timeline([0, 5, 8], [A, B, C])
    assert [timeline.index(step) for step in (0, 4, 5, 7, 8, 99)] == [0, 0, 1, 1, 2, 2]
    assert timeline.at(7) == B


def test_a_group_trains_since_the_start_of_its_unbroken_stretch():
    timeline = Timeline([0, 5, 8, 12], [A, B, C, B])
    assert timeline.since("a", 7) == 0
    assert timeline.since("b", 7) == 5
    assert timeline.since("a", 13) == 12  # it rested from 8 to 12
    assert timeline.since("c", 8) == 8


def test_a_phase_that_another_replaces_at_once_never_ran():
    timeline = Timeline([0, 5, 5], [A, C, B])
    assert timeline.at(5) == B
    assert timeline.since("a", 6) == 0
    assert timeline.ever(6) == A | B
    assert timeline.ever(5) == A
