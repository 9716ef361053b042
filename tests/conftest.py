import os

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def own_mixed_precision():
    """A Trainer leaves its precision in the environment; the next test must not inherit it."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state(reset_partial_state=True)
