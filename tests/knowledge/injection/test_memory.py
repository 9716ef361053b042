"""Nothing of a step outlives it, and nothing of a run the run."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_adapt import adapt
from hf_adapt.knowledge import (
    load_knowledge_model,
)
from hf_adapt.unfreezing import GradualUnfreezing
from tests.helpers import toy
from tests.helpers.injectors import injection, trained, trainer


def test_loaded_models_go_with_their_last_reference(tmp_path: Path) -> None:
    trained(tmp_path)
    gone = []
    for _ in range(2):
        model = load_knowledge_model(tmp_path / "final")
        inputs = toy.tokenizer()(["w0"], return_tensors="pt", return_token_type_ids=False)
        with pytest.warns(UserWarning, match="linked in the tokenizer's own decoding"):
            model(**inputs).logits.sum().backward()
        gone.append(weakref.ref(model))
        del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_run_that_fails_keeps_nothing(tmp_path: Path) -> None:
    class Broken(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    one = trainer(tmp_path, cls=Broken, max_steps=8)
    own = GradualUnfreezing(every_steps=1)
    adapt(one, injection(), own)
    try:
        one.train()
    except KeyboardInterrupt:
        pass
    watched = [weakref.ref(one), weakref.ref(one.model)]
    del one
    gc.collect()
    assert [ref() for ref in watched] == [None, None] and own.name == "unfreezing"
