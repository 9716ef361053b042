"""The pytest side of trainer_suite.py: puts AdaptationMixin under the Trainers, records outcomes.

trainer_suite.py names this module in PYTEST_PLUGINS, so every pytest process has it before any test
module is imported: the controller, the xdist workers, and the pytest that a test starts itself.
"""

import json
import os
import sys

import pytest
import transformers
import transformers.trainer
import transformers.trainer_seq2seq

USE_MIXIN = os.environ.get("TRAINER_SUITE_MIXIN") == "1"
RECORD = os.environ.get("TRAINER_SUITE_RECORD")
# The first process to get here is the controller; those it starts inherit its id.
IS_CONTROLLER = os.environ.setdefault("TRAINER_SUITE_CONTROLLER", str(os.getpid())) == str(
    os.getpid()
)


def _replace_everywhere(stock: type, replacement: type) -> None:
    """Rebind every name that holds `stock`, in transformers and whatever has imported from it."""
    for name, module in list(sys.modules.items()):
        # hf_adapt stays as a user has it: its own bases are the stock classes.
        if module is None or name.partition(".")[0] == "hf_adapt":
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is stock:
                setattr(module, attribute, replacement)


def _put_mixin_under(stock: type) -> type:
    from hf_adapt import AdaptationMixin

    identity = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    adapted = type(stock)(
        stock.__name__, (AdaptationMixin, stock), {**identity, "__doc__": stock.__doc__}
    )
    _replace_everywhere(stock, adapted)
    return adapted


if USE_MIXIN:
    # Both are taken before either is replaced: Seq2SeqTrainer's own base stays the stock Trainer.
    for _stock in (transformers.trainer.Trainer, transformers.trainer_seq2seq.Seq2SeqTrainer):
        _put_mixin_under(_stock)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Fail at once if the run is not what it says it is."""
    for trainer in (transformers.Trainer, transformers.Seq2SeqTrainer):
        has_mixin = "AdaptationMixin" in {base.__name__ for base in trainer.__mro__}
        if has_mixin is not USE_MIXIN:
            raise pytest.UsageError(
                f"expected {'AdaptationMixin under' if USE_MIXIN else 'the stock'} "
                f"{trainer.__name__}, got {[base.__name__ for base in trainer.__mro__]}"
            )


def _record(**entry: str) -> None:
    if IS_CONTROLLER and RECORD:
        with open(RECORD, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _exception_name(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    name = crash.message.partition(":")[0].strip() if crash else ""
    # "Failed" is pytest's own (pytest.fail, a time-out); a long sentence is no name.
    return name.rpartition(".")[2] if name.replace(".", "").isidentifier() else ""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line for each phase that decides something."""
    if report.when != "call" and report.passed:
        return
    outcome: str = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.skipped else "xpassed"
    elif report.failed and report.when != "call":
        outcome = "error"
    _record(
        test=report.nodeid,
        outcome=outcome,
        exception=_exception_name(report) if report.failed else "",
        text=report.longreprtext if report.failed else "",
    )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module that cannot be imported is an outcome too."""
    if report.failed:
        _record(test=report.nodeid, outcome="not collected", exception="", text=report.longreprtext)
