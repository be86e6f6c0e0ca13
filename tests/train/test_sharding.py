"""A run under FSDP2: two processes that hold a half of the model each end as one that holds it all, and resume."""

import json
import os
import signal
import socket
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

from deit_fast.train import checkpoints, digits
from deit_fast.train import run as runs
from deit_fast.train.run import Run
from tests.train.test_run import BATCH, job, newest, small, starting, untouched, without_drop_path

# As `accelerate launch --use_fsdp --fsdp_version 2` sets it.
ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def recipe_of(batch_size: int):
    return without_drop_path(batch_size=batch_size, model_ema=False, clip_grad=0.5)


def _train_one_of_two(images: Path, out: Path, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **ENVIRONMENT}
    # Of processes without a GPU Accelerate makes DistributedDataParallel.
    state = Accelerator(cpu=True, mixed_precision="no").state
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()

    def running(name: str, **given) -> Run:
        return Run(recipe_of(BATCH // 2), job(images, out / name, log_every=1, save_every=None, **given))

    def stop(step, *_):
        if step in (3, 5):
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(PartialState, "destroy_process_group"):  # one group of processes for all
        run = running("whole")
        assert type(run.model.blocks[0]).__name__ == "FSDPBlock"
        assert run.train()
        assert not running("stopped").train(stop)
        run = running("stopped", resume="auto")
        assert run.step == 3 and not run.train(stop)
        run = running("stopped", resume="auto")  # which begins with an evaluation
        assert run.step == 5 and run.train()
    if rank:
        run.model.blocks[0].mlp.fc1.bias.to_local().detach()[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step-00000010 is kept"):
        run._save()
    run.accelerator.end_training()


def test_two_processes_with_a_half_each_lose_what_one_loses_and_resume_bit_for_bit(tmp_path):
    """In float32; one has a batch more to be evaluated on."""
    images = tmp_path / "images"
    digits.write_folder(images, most=160)
    for file in sorted((images / "val").rglob("*.png"))[33:]:
        file.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [starting(_train_one_of_two, images, tmp_path, rank, port) for rank in range(2)]
    one = Run(recipe_of(BATCH), job(images, tmp_path / "one", log_every=1, save_every=None))
    assert one.train()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "whole")]
    losses = [[record.get("loss", record.get("val_loss")) for record in map(json.loads, log)] for log in logs]
    assert len(losses[0]) == 2 * (5 + 1) and losses[1] == pytest.approx(losses[0], rel=0, abs=1e-3)

    ends = [checkpoints.Saved(newest(tmp_path / name)) for name in ("whole", "stopped")]
    torch.testing.assert_close(*(end.weights for end in ends), rtol=0, atol=0)
    torch.testing.assert_close(*(end.state["optimizer"]["state"] for end in ends), rtol=0, atol=0)
    again = timm.create_model(f"local-dir:{tmp_path}/whole/best", pretrained=True)
    assert all(tensor.shape == again.state_dict()[name].shape for name, tensor in one.model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "of_job", "message"),
    [
        ({"model_ema": True}, {}, "model_ema: a model that FSDP2 shards"),
        ({}, {"compile": True}, "--compile: a model that FSDP2 shards"),
        ({"opt": "sgd"}, {}, "with adam, .*, not sgd"),
        ({"model": "test_resnet", "model_kwargs": {}}, {}, "test_resnet has BatchNorm"),
        (None, {}, "DistributedDataParallel and FSDP2 .*, not FSDP"),
    ],
    ids=lambda given: str(given)[:20],
)
def test_what_sharding_can_not_do_is_refused_before_data_is_touched(tmp_path, monkeypatch, given, of_job, message):
    monkeypatch.setattr(runs, "open_data", untouched)
    monkeypatch.setattr(Accelerator, "is_fsdp2", given is not None)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=message):
        Run(small(**{"model_ema": False, **(given or {})}), job(tmp_path, tmp_path, **of_job))
