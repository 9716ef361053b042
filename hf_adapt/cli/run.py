"""`hf-adapt run --source A --target B` and `hf-adapt run CONFIG.yaml`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_adapt.cli.errors import check_installed, fail

NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def run(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(help="A YAML file with data, methods, pairs, seeds and options."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="The domain with labels: a csv, tsv, json, jsonl or parquet file, a data set on "
            "the Hub, or a domain of CONFIG."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The domain to adapt to, in the same way; labels are not needed."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the model to start from.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the label.")] = None,
    group_column: Annotated[
        str | None,
        typer.Option(help="Column with the group of a row: accuracies by group, for the report."),
    ] = None,
    target_priors: Annotated[
        str | None,
        typer.Option(
            help="The target's class frequencies, for the methods that use them: "
            "'{spam: 0.13, ham: 0.87}', uniform, predicted, source, estimate, or given (counted on "
            "the target's labels)."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Run this method of CONFIG, or this class of hf_adapt.alignment, alone; may be "
            "repeated."
        ),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="Run this pair alone, as source:target; may be repeated."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many seeds, or which: 5, or 42,43.")
    ] = None,
    num_train: Annotated[
        int | None, typer.Option(help="Training rows of each domain, at most.")
    ] = None,
    num_test: Annotated[int | None, typer.Option(help="Test rows of each domain, at most.")] = None,
    balanced: Annotated[
        bool | None, typer.Option("--balanced", help="As many rows of every class.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text that are read.")] = None,
    freeze_layers: Annotated[
        int | None, typer.Option(help="Train neither the embeddings nor the first N layers.")
    ] = None,
    cache_prefix: Annotated[
        bool | None, typer.Option(help="Compute the frozen layers once per row.")
    ] = None,
    save_models: Annotated[bool | None, typer.Option(help="Save every model.")] = None,
    choose: Annotated[
        bool | None,
        typer.Option(
            "--choose",
            help="Choose one of the methods, without target labels, or by those that you have "
            "filled into to_label.csv.",
        ),
    ] = None,
    diagnose: Annotated[
        bool | None,
        typer.Option("--diagnose", help="Measure the domains' distance in every layer."),
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the results.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes; by default one for two cores.", min=1)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run again what is finished.")
    ] = False,
) -> None:
    """Train and compare methods on labelled rows of one domain and unlabelled rows of another.

    With --source and --target it trains a model on the source alone and one that is adapted to the
    target. With CONFIG it runs methods × pairs of domains × seeds, or trains several tasks alone
    and together (mixture:). If it is interrupted, run the same command again: it continues where it
    stopped. Every option of TrainingArguments can be given too (--max_steps 100).
    """
    check_installed("run", NEEDED)

    from hf_adapt.cli import run_options
    from hf_adapt.experiments.data import DataError
    from hf_adapt.experiments.screen import execute
    from hf_adapt.experiments.settings import ConfigError
    from hf_adapt.experiments.training import ModelError

    flags = {
        key: value
        for key, value in context.params.items()
        if value is not None and key not in ("context", "config", "jobs", "overwrite")
    }
    try:
        file, training = run_options.split_arguments(config, context.args, list(context.params))
        experiment = run_options.experiment(file, flags, training)
        complete = execute(experiment, jobs, overwrite)
    except (ConfigError, DataError, ModelError, RuntimeError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
    if not complete:
        raise typer.Exit(1)
