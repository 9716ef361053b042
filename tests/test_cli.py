"""The command line: quick to start, and what it says of wrong names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertModel
from typer.testing import CliRunner

import hf_adapt
from hf_adapt.cli import app
from tests.helpers.distillation import tokenizer
from tests.helpers.models import bert

RUNNER = CliRunner()

HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "pandas")


def said(*command: str) -> str:
    done = RUNNER.invoke(app, list(command))
    assert done.exit_code == 1, done.output
    return " ".join(done.output.split())


def test_help_loads_nothing_heavy() -> None:
    """It took twelve seconds of CPU."""
    program = (
        "import json, sys\n"
        "from hf_adapt.cli import app\n"
        "found = []\n"
        "for words in (['--help'], ['cache-teacher', '--help'], ['schedule', '--help'],"
        " ['merge', '--help'], ['--version']):\n"
        "    app(words, standalone_mode=False)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(hf_adapt.__file__).parents[1],
    )
    *_, version, loaded = done.stdout.splitlines()
    assert json.loads(loaded) == []
    assert version == f"hf-adapt {hf_adapt.__version__}"


@pytest.mark.parametrize("command", [["schedule"], ["cache-teacher"]])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./no/such/teacher", "There is no folder ./no/such/teacher"),
        ("no such teacher", "There is no folder no such teacher"),
        ("{file}", "is a file"),
    ],
)
def test_a_wrong_path_of_a_model(
    command: list[str], name: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text\nw1\n")
    more = [] if command == ["schedule"] else [str(file), "-o", str(tmp_path / "cache")]
    output = said(*command, name.replace("{file}", str(file)), *more)
    assert expected in output
    assert "alphanumeric" not in output


@pytest.mark.parametrize("task", [[], ["--task", "none"], ["--task", "sequence-classification"]])
def test_a_teacher_without_a_head(task: list[str], tmp_path: Path) -> None:
    BertModel(bert().config).save_pretrained(tmp_path / "headless")
    tokenizer().save_pretrained(tmp_path / "headless")
    (tmp_path / "rows.csv").write_text("text\nw1 w2\n")
    output = said(
        "cache-teacher",
        str(tmp_path / "headless"),
        str(tmp_path / "rows.csv"),
        "-o",
        str(tmp_path / "cache"),
        *task,
    )
    if "sequence-classification" in task:
        assert "no weights for classifier.bias, classifier.weight" in output
    else:
        assert "BertModel, which has no head and so predicts nothing" in output
    assert "Override" not in output


def test_what_is_missing_or_wrong(teacher_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text\nw1 w2\n")
    start = ("cache-teacher", str(teacher_folder))
    end = ("-o", str(tmp_path / "cache"))
    top = said(*start, str(rows), *end, "--top-k", "2")
    assert "--temperature" in top and "None" not in top
    assert "There is no folder no such rows" in said(*start, "no such rows", *end)
    assert "rows.txt" in said(*start, str(tmp_path / "rows.txt"), *end)
    (tmp_path / "rows.txt").write_text("w1\n")
    assert "expected .csv, .tsv, .json, .jsonl or .parquet" in said(
        *start, str(tmp_path / "rows.txt"), *end
    )
    assert "no tokenizer in" in said(*start, str(rows), *end, "--tokenizer", str(tmp_path))
    assert "'txt'. Did you mean" not in said(*start, str(rows), *end, "--text-column", "zzz")
    assert "Did you mean 'text'?" in said(*start, str(rows), *end, "--text-column", "txt")
    assert "no split 'tran'" in said(*start, str(rows), *end, "--split", "tran")
