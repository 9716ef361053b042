"""Makes a notebook of each example: examples/notebooks/*.ipynb, for Jupyter and Colab.

A notebook is its script, unchanged: a cell of text from the docstring, two that install hf_adapt
and say where the script lies, one for the imports, one for each definition, and one that calls
`main`. Run this file after an example has changed (`make notebooks`).
"""

import ast
from pathlib import Path

import jupytext
import nbformat

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "notebooks"
REPOSITORY = "https://github.com/OWNER/hf_adapt"  # to be set when hf_adapt is published

SET_UP = f"""\
# Leave this cell out in a clone of hf_adapt that is installed with its extra `examples`.
# OWNER stands for the account that hf_adapt is published under.
!test -d benchmarks || git clone --depth 1 {REPOSITORY} hf_adapt_clone
%cd hf_adapt_clone
%pip install --quiet ".[examples]"
"""
PLACE = """\
from pathlib import Path

clone = next(f for f in [Path.cwd(), *Path.cwd().parents] if (f / "benchmarks").is_dir())
__file__ = str(clone / "examples" / "{name}")  # the script that these cells are
"""
CALL = """\
# Options as on the command line, such as main(["--seed", "1"]).
main([])
"""


def cells(script: Path) -> list[tuple[str, str]]:
    """The kind (`markdown` or `code`) and the text of each cell."""
    text = script.read_text(encoding="utf-8")
    module, lines = ast.parse(text), text.splitlines()
    title, _, rest = ast.get_docstring(module).partition("\n")
    found = [("markdown", f"# {title}\n{rest}"), ("code", SET_UP)]
    found.append(("code", PLACE.format(name=script.name)))
    docstring, *body, _ = module.body  # the last statement calls main, as a script
    start = docstring.end_lineno
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
            found += [("code", "\n".join(lines[start:first]))]
            found += [("code", "\n".join(lines[first : node.end_lineno]))]
            start = node.end_lineno
    found += [("code", "\n".join(lines[start : body[-1].end_lineno])), ("code", CALL)]
    return [(kind, text.strip("\n")) for kind, text in found if text.strip()]


def notebook(script: Path) -> str:
    """The notebook of a script, as the text of its file."""
    lines = []
    for kind, text in cells(script):
        is_text = kind == "markdown"
        lines.append("# %% [markdown]" if is_text else "# %%")
        # In this format text, and what is no Python, stands behind a comment sign.
        lines += [
            f"# {line}" if is_text or line.startswith(("!", "%")) else line
            for line in text.split("\n")
        ]
    made = jupytext.reads("\n".join(lines), fmt="py:percent")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number}", {}  # else drawn at random each time
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.ipynb"):  # a script may have been renamed
        old.unlink()
    for script in sorted(EXAMPLES.glob("*.py")):
        path = FOLDER / f"{script.stem}.ipynb"
        path.write_text(notebook(script), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
