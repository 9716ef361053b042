"""Starts a test's script in two processes on this machine."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(script: str, folder: Path, *jobs: str) -> None:
    """Run jobs of a script in two processes.

    Args:
        script: Its module, such as `tests.engine.distributed_script`.
        folder: Where it writes.
        jobs: Each is name:setting:rows:steps.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # As a module: the files beside it must not hide libraries of the same name.
    done = subprocess.run(
        [*command, "--module", script, str(folder), *jobs],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
