"""What trackers get: each term beside the loss, in the groups that the Trainer's callbacks make."""

from pathlib import Path

import pytest
from transformers import Trainer

from hf_adapt import AdaptationCallback
from hf_adapt.alignment import DANN
from hf_adapt.continual import Replay
from hf_adapt.unfreezing import GradualUnfreezing
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments

OURS = {
    "loss/dann",
    "loss/replay",
    "loss/task",
    "dann/domain_accuracy",
    "dann/lambda",
    "unfreezing/phase",
    "unfreezing/trainable_parameters",
}


def train(folder: Path, tracker: str) -> dict[str, float]:
    """Four steps, and an evaluation, with several adaptations; what the last step has logged."""
    trainer = Trainer(
        bert(),
        arguments(
            folder,
            max_steps=4,
            report_to=[tracker],
            eval_strategy="steps",
            eval_steps=4,
            run_name="run",
        ),
        train_dataset=rows(12, 0),
        eval_dataset=rows(4, 1),
        data_collator=collate,
    )
    added = (DANN(), Replay(rows(4, 2), ratio=0.5), GradualUnfreezing())
    trainer.add_callback(AdaptationCallback(*added, target_dataset=rows(12, 3, labels=None)))
    trainer.train()
    return next(logs for logs in trainer.state.log_history if logs["step"] == 4)


def test_tensorboard_has_each_term_beside_the_loss(tmp_path: Path) -> None:
    """One group for training and one for evaluation; a term is shown next to the loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    last = train(tmp_path, "tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    tags = events.Tags()["scalars"]
    assert {f"train/{name}" for name in OURS} <= {*tags}
    assert {tag.split("/")[0] for tag in tags} == {"train", "eval"}
    assert [event.step for event in events.Scalars("train/loss/dann")] == [1, 2, 3, 4]
    for name in (*OURS, "loss"):
        assert events.Scalars(f"train/{name}")[-1].value == pytest.approx(last[name], rel=1e-6)


def test_wandb_has_the_same_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline; sections of W&B are what stands before the first slash."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    last = train(tmp_path, "wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    for name in (*OURS, "loss"):
        assert summary[f"train/{name}"] == pytest.approx(last[name], rel=1e-6)
    assert {key.split("/")[0] for key in summary if "/" in key} == {"train", "eval"}


def test_mlflow_can_store_each_term_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's store of files cannot have a metric `loss` and another `loss/dann`."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    last = train(tmp_path, "mlflow")
    (run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
    stored = run.data.metrics
    assert stored["losses/dann"] == pytest.approx(last["losses/dann"])
    groups = {key.split("/")[0] for key in stored if "/" in key}
    assert groups == {"losses", "dann", "unfreezing"}
