"""The command line: `hf-adapt run`, `report`, `schedule`, `cache-teacher` and `merge`.

torch and transformers take seconds to import, so each command imports them itself.
"""

from typing import Annotated

import typer

from hf_adapt import __version__
from hf_adapt.cli.cache_teacher import cache_teacher
from hf_adapt.cli.merge import merge
from hf_adapt.cli.report import report
from hf_adapt.cli.run import run
from hf_adapt.cli.schedule import schedule

HELP = "Domain adaptation and knowledge transfer for the Hugging Face Trainer."

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(run)
app.command()(report)
app.command()(schedule)
app.command()(cache_teacher)
app.command()(merge)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-adapt {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None: ...
