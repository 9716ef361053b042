"""Does transformers' own test suite of its Trainer see AdaptationMixin?

Runs the suite twice, with the stock Trainers and with `AdaptationMixin` put under `Trainer` and
`Seq2SeqTrainer` before any test module is imported, and compares the outcomes test by test. A test
that fails both times, with the same exception, is no difference: many need a network or a GPU. It
proves nothing either, so the number that counts is "passed both times". Programs that a test starts
itself (torchrun) have the stock Trainer in both runs.

    make trainer-suite SUITE=../transformers/tests/trainer
    python scripts/trainer_suite.py …/tests/trainer/test_trainer_callback.py -- -k event_flow

The suite is not part of this repository: take it from transformers at the version installed. What
follows `--` goes to pytest. Exits 1 on any difference, on zero tests, and on a run that broke.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODES = ("stock", "mixin")
RERUNS = 2
# The worst phase of a test (or subtest) is the test's outcome.
SEVERITY = ("passed", "skipped", "xfailed", "xpassed", "failed", "error", "not collected")
PROVES_NOTHING = ("failed", "error", "not collected")
# pytest's exit codes for "all passed" and "some failed"; the others mean that the run broke.
COMPLETED = (0, 1)


@dataclass
class Outcome:
    """What one test came to in one run."""

    name: str
    exception: str = ""
    text: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.exception

    def __str__(self) -> str:
        return f"{self.name} ({self.exception})" if self.exception else self.name


class SuiteError(Exception):
    """The suite could not be run."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", type=Path, nargs="+", help="transformers' tests/trainer, or files")
    parser.add_argument("--workers", type=int, default=2, help="test processes (default: 2)")
    parser.add_argument("--timeout", type=int, default=300, help="seconds a test (default: 300)")
    parser.add_argument("--online", action="store_true", help="let tests fetch from the hub")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.pytest_args = argv[cut + 1 :]
    return args


def package_root(path: Path) -> Path:
    """The folder above the outermost package: the suite's tests import each other relatively."""
    folder = path if path.is_dir() else path.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def read_outcomes(record: Path) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        new = Outcome(entry["outcome"], entry["exception"], entry["text"])
        old = outcomes.get(entry["test"])
        if old is None or SEVERITY.index(new.name) > SEVERITY.index(old.name):
            outcomes[entry["test"]] = new
    return outcomes


def run(mode: str, tests: list[str], root: Path, args: argparse.Namespace) -> dict[str, Outcome]:
    """One pytest run in a process of its own; returns the outcome of each test."""
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch, "outcomes.jsonl")
        record.touch()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "--no-header", "-rN"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += [f"--timeout={args.timeout}", "-n", str(args.workers), f"--rootdir={root}"]
        if not (root / "pyproject.toml").exists():
            # Else pytest would look further up, and find a configuration that is not the suite's.
            Path(scratch, "pytest.ini").write_text("[pytest]\n")
            command += ["-c", str(Path(scratch, "pytest.ini"))]
        env = {
            **os.environ,
            "PYTEST_PLUGINS": "trainer_suite_plugin",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")])
            ),
            "TRAINER_SUITE_MIXIN": "1" if mode == "mixin" else "0",
            "TRAINER_SUITE_RECORD": str(record),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        if not args.online:
            env["HF_HUB_OFFLINE"] = "1"
        print(f"\n{mode}: {len(tests)} path(s), {args.workers} workers", flush=True)
        start = time.monotonic()
        code = subprocess.run([*command, *args.pytest_args, *tests], cwd=root, env=env).returncode
        outcomes = read_outcomes(record)
        print(f"{mode}: {len(outcomes)} outcomes in {time.monotonic() - start:.0f} s", flush=True)
    if code not in COMPLETED:
        raise SuiteError(f"pytest ended with {code} in the {mode} run; its own message is above")
    return outcomes


def differing(stock: dict[str, Outcome], mixin: dict[str, Outcome]) -> list[str]:
    return [test for test in stock if test in mixin and stock[test].key != mixin[test].key]


def rerun_differing(
    stock: dict[str, Outcome], mixin: dict[str, Outcome], root: Path, args: argparse.Namespace
) -> list[str]:
    """Run the tests that differ again, both ways; returns those that then agreed."""
    flaky: list[str] = []
    for attempt in range(1, RERUNS + 1):
        tests = differing(stock, mixin)
        if not tests:
            break
        print(f"\n{len(tests)} differ; running them again, both ways ({attempt} of {RERUNS})")
        again = {mode: run(mode, tests, root, args) for mode in MODES}
        for test in tests:
            if test in again["stock"] and test in again["mixin"]:
                stock[test], mixin[test] = again["stock"][test], again["mixin"][test]
        flaky += [test for test in tests if stock[test].key == mixin[test].key]
    return flaky


def compare(stock: dict[str, Outcome], mixin: dict[str, Outcome], flaky: list[str]) -> bool:
    """Print the comparison; True if the mixin cannot be seen."""
    differ = differing(stock, mixin)
    only = {
        "stock": sorted(stock.keys() - mixin.keys()),
        "mixin": sorted(mixin.keys() - stock.keys()),
    }
    print("\n" + "=" * 80)
    for test in differ:
        print(f"DIFFERS  {test}\n    stock: {stock[test]}\n    mixin: {mixin[test]}")
        text = mixin[test].text or stock[test].text
        print("".join(f"    | {line}\n" for line in text.splitlines()[-30:]))
    for mode in MODES:
        for test in only[mode]:
            print(f"ONLY     {test}: in the {mode} run alone")
    for test in flaky:
        print(f"FLAKY    {test}: differed, then the same when both were run again ({stock[test]})")
    for test, outcome in stock.items():
        if outcome.name not in PROVES_NOTHING or test in differ or test not in mixin:
            continue
        print(f"NO PROOF {test}: {outcome} both times")
    print(f"\n{'outcome':<16}{'stock':>8}{'mixin':>8}")
    counts = {"stock": Counter(o.name for o in stock.values())}
    counts["mixin"] = Counter(o.name for o in mixin.values())
    for name in SEVERITY:
        if counts["stock"][name] or counts["mixin"][name]:
            print(f"{name:<16}{counts['stock'][name]:>8}{counts['mixin'][name]:>8}")
    both = sum(o.name == "passed" == mixin[t].name for t, o in stock.items() if t in mixin)
    print(f"{'all':<16}{len(stock):>8}{len(mixin):>8}")
    print(
        f"\n{both} passed both times; {len(differ)} differ, {len(only['stock'])} only stock, "
        f"{len(only['mixin'])} only mixin, {len(flaky)} flaky"
    )
    if not both:
        print(
            "No test passed both times: that proves nothing. Is this transformers' tests/trainer?"
        )
    return bool(both) and not differ and not any(only.values())


def main() -> int:
    args = parse_args()
    missing = [str(path) for path in args.suite if not path.exists()]
    if missing:
        print(f"No such file or folder: {', '.join(missing)}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("parameterized") is None:
        print(
            "The suite needs more packages: pip install 'hf-adapt[trainer-suite]'", file=sys.stderr
        )
        return 2
    paths = [path.resolve() for path in args.suite]
    root = package_root(paths[0])
    try:
        stock, mixin = (run(mode, [str(path) for path in paths], root, args) for mode in MODES)
        flaky = rerun_differing(stock, mixin, root, args)
    except SuiteError as error:
        print(f"trainer suite: {error}", file=sys.stderr)
        return 1
    return 0 if compare(stock, mixin, flaky) else 1


if __name__ == "__main__":
    sys.exit(main())
