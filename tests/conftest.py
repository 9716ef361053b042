import functools
import gc
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import imports
from hypothesis import settings

# The same examples in every run; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

pytest.register_assert_rewrite("tests.helpers")


# A tenth of a tiny run: a seed for a device that is not there is kept with the trace of its stack,
# and each Trainer looks for the same optional packages on the disk.
if not torch.cuda.is_available():
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = lambda seed: None
imports._is_package_available = functools.cache(imports._is_package_available)


FINISHED = itertools.count(1)


def spare_the_collector() -> None:
    """Each `train()` collects: most of a tiny run, unless what was imported is left out."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Now all test modules are imported."""
    spare_the_collector()


def pytest_runtest_logfinish(nodeid: str, location: tuple[str, int | None, str]) -> None:
    """Tests import more: models are imported when they are asked for."""
    if next(FINISHED) % 8 == 0:
        spare_the_collector()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the interpreter end as it would have."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def own_mixed_precision():
    """A Trainer leaves its precision in the environment; the next test must not inherit it.

    Nor the compiler that torch_compile=True names there.
    """
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    """A saved classifier with its tokenizer."""
    from tests.helpers.distillation import save_teacher

    return save_teacher(tmp_path / "teacher")


@pytest.fixture(scope="session")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs in two processes of the modules that were selected, in one launch."""
    from tests.helpers.distributed import Job, launch

    jobs: dict[str, Job] = {}
    for item in request.session.items:
        for name, job in getattr(getattr(item, "module", None), "JOBS", {}).items():
            jobs[f"{item.path.parent.name}/{name}"] = job
    folder = tmp_path_factory.mktemp("two_processes")
    launch(folder, jobs)
    return folder


@pytest.fixture
def two_processes(request: pytest.FixtureRequest, launched: Path) -> Path:
    """Where the module's `JOBS` were trained, each in a folder of its name."""
    return launched / request.path.parent.name


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a job in this process, once, and gives its folder."""
    folders: dict[str, Path] = {}

    def train(job: object) -> Path:
        if repr(job) not in folders:
            folders[repr(job)] = tmp_path_factory.mktemp("one_process") / "job"
            job.train(folders[repr(job)])
        return folders[repr(job)]

    return train
