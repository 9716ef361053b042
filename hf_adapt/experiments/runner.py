"""All cells of an experiment: those that are missing are run, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from hf_adapt.experiments.cell import Cell, cell_folder, files_of, finished_result, run_cells
from hf_adapt.experiments.config import Experiment

Report = Callable[[Cell, dict[str, Any] | None, bool], None]
"""Called with a cell when it starts (no result yet) and ends, and whether it was kept."""


def cells_of(experiment: Experiment) -> list[Cell]:
    """Every combination, one seed of all methods after the other."""
    return [
        Cell(source, target, method, seed)
        for source, target in experiment.pairs
        for seed in experiment.seeds
        for method in experiment.methods
    ]


def trainings_of(experiment: Experiment) -> list[list[Cell]]:
    """The cells that one training fills: all tasks of a mixture; any other cell is alone."""
    groups: dict[Any, list[Cell]] = {}
    mixes = {name: method.mixes for name, method in experiment.methods.items()}
    for cell in cells_of(experiment):
        key = (cell.method, cell.seed) if mixes[cell.method] else cell
        groups.setdefault(key, []).append(cell)
    return list(groups.values())


def default_jobs() -> int:
    """One process for two cores; one in all where there is a GPU."""
    return 1 if torch.cuda.is_available() else max(1, _cores() // 2)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_experiment(
    experiment: Experiment,
    jobs: int | None = None,
    overwrite: bool = False,
    report: Report = lambda cell, result, kept: None,
) -> list[dict[str, Any]]:
    """Run what is missing.

    Args:
        experiment: What to run.
        jobs: Processes; the cores are divided among them.
        overwrite: Run again what is finished.
        report: Called when a cell starts and when it ends.

    Returns:
        A result for each cell, in the order of [`cells_of`]; failed ones have the key `error`.

    Raises:
        RuntimeError: If a process was killed.
    """
    jobs = jobs or default_jobs()
    cells = cells_of(experiment)
    folders = {cell: cell_folder(experiment, cell) for cell in cells}
    results: dict[Cell, dict[str, Any]] = {}
    missing: list[list[Cell]] = []
    for group in trainings_of(experiment):
        kept = {
            cell: finished_result(
                folders[cell], files_of(experiment, cell), experiment.group_column_of(cell.target)
            )
            for cell in group
        }
        if overwrite or not all(kept.values()):
            missing.append(group)
            continue
        for cell, found in kept.items():
            assert found is not None
            results[cell] = found
            report(cell, found, True)
    threads = max(1, _cores() // jobs)
    run = _in_processes if min(jobs, len(missing)) > 1 else _here
    for cell, result in run(experiment, missing, folders, min(jobs, len(missing)), threads, report):
        results[cell] = result
        report(cell, result, False)
    return [results[cell] for cell in cells]


def _here(
    experiment: Experiment,
    groups: Sequence[Sequence[Cell]],
    folders: dict[Cell, Path],
    jobs: int,
    threads: int,
    report: Report,
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads))
    try:
        for cells in groups:
            for cell in cells:
                report(cell, None, False)
            results = run_cells(experiment, cells, [folders[cell] for cell in cells])
            yield from zip(cells, results, strict=True)
    finally:
        torch.set_num_threads(before)


def _start_worker(threads: int) -> None:
    """Use some threads; end when the process that gave the work is killed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_processes(
    experiment: Experiment,
    groups: Sequence[Sequence[Cell]],
    folders: dict[Cell, Path],
    jobs: int,
    threads: int,
    report: Report,
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (threads,))
    waiting = list(reversed(groups))
    running: dict[Any, Sequence[Cell]] = {}

    def start() -> None:
        cells = waiting.pop()
        places = [folders[cell] for cell in cells]
        running[pool.submit(run_cells, experiment, cells, places)] = cells
        for cell in cells:
            report(cell, None, False)

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                start()
            done = next(as_completed(running))
            cells = running.pop(done)
            yield from zip(cells, done.result(), strict=True)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"A process was killed while {cells[0]} ran, perhaps for want of memory. Run the same "
            "command again with fewer --jobs: what is finished is kept."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
