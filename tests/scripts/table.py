"""The table of docs/scripts.md: written from outcomes, and read for the test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "scripts.md"

Outcomes = Mapping[tuple[str, str], str]
"""By script and capability."""

HEAD = """# Official scripts with one line added

This page shows which example scripts of transformers, TRL and sentence-transformers train \
with which capability of hf_adapt. The scripts are shortened \
([tests/scripts](../tests/scripts)): the models are tiny and the rows are artificial, but \
the data preparation, the collator, the metrics and the Trainer are those of the original. \
One line is added to each: `trainer.add_callback(…)`.

- **works**: the run trains, the saved model loads with plain `from_pretrained` without a \
missing weight, and a run that is interrupted and resumed equals the uninterrupted one bit \
for bit.
- **with an option**: the line is refused before training with the advice to set this \
option, and it works with the option.
- **no**: the line is refused before training, with the message below the table.

`make script-table` generates this page, and a test compares it with what the scripts do.

"""

FOOT = """
¹ The plain Trainer does not resume this script bit for bit either. `run_mlm`: the collator \
draws its masks when it builds a batch, and the batch after a checkpoint is built before it.\
 `run_image_classification`: transformers 5.24 saves a ViT under other names than its \
Trainer loads, and starts again with new layers.

Notes on some of them:

- **Multiple choice**: each choice of a row is a row of features.
- **SentenceTransformerTrainer**: the loss sees source rows alone, and the features are \
those of the first text column. Cached losses run the model without gradients, so the \
features need one more forward of the source rows, and the memory of a whole micro-batch.
- **CrossEncoderTrainer**: the features are those of pairs of the first two text columns.
- **DPO and reward training**: adapt the model to the target first (with `SFTTrainer`), and \
train on the preferences afterwards.

Refusals:

"""


def render(outcomes: Outcomes) -> str:
    """The page."""
    scripts = list(dict.fromkeys(script for script, _ in outcomes))
    capabilities = list(dict.fromkeys(capability for _, capability in outcomes))
    words: list[str] = []
    lines = [f"| script | {' | '.join(capabilities)} |", "|---" * (len(capabilities) + 1) + "|"]
    for script in scripts:
        cells = [_cell(outcomes[script, capability], words) for capability in capabilities]
        lines.append(f"| `{script}` | {' | '.join(cells)} |")
    refusals = [f"{number}. {sentence}" for number, sentence in enumerate(words, 1)]
    return HEAD + "\n".join(lines) + "\n" + FOOT + "\n".join(refusals) + "\n"


def _cell(outcome: str, words: list[str]) -> str:
    if not outcome.startswith("refuses: "):
        return outcome.removeprefix("works ") if outcome.startswith("works with") else outcome
    sentence = outcome.removeprefix("refuses: ")
    if sentence not in words:
        words.append(sentence)
    return f"no ({words.index(sentence) + 1})"


def read(page: str) -> dict[tuple[str, str], str]:
    """The outcomes that a page tells."""
    words = dict(re.findall(r"^(\d+)\. (.*)$", page, flags=re.MULTILINE))
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    found: dict[tuple[str, str], str] = {}
    for script, *cells in rows[1:]:
        for capability, cell in zip(rows[0][1:], cells, strict=True):
            text = cell.strip()
            if number := re.fullmatch(r"no \((\d+)\)", text):
                text = f"refuses: {words[number[1]]}"
            elif text.startswith("with"):
                text = f"works {text}"
            found[script.strip(" `"), capability.strip()] = text
    return found
