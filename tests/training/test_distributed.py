"""Two processes with half of the batch each train as one with the whole of it: real gloo ranks, started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_lamb import LambForAudioCaptioning

SCRIPT = Path(__file__).parent / "train_tiny.py"
TERMS = ("decoder_loss", "guided_loss", "cs_global_loss", "cs_token_loss", "info_nce_loss")
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
OFF = {
    "decoder_loss_weight": 0.0,
    "guided_loss_weight": 0.0,
    "cs_global_weight": 0.0,
    "cs_token_weight": 0.0,
    "info_nce_weight": 0.0,
}
ALONE = {"all": {}} | {name: OFF | {name: 1.0} for name in OFF}


def settings(out, ranks=1, rows=8, model=None, **training):
    """`resume`, `dies`, `save` and `fsdp` are the script's own; the rest are TrainingArguments."""
    out.mkdir(exist_ok=True, parents=True)
    own = {"out": str(out), "ranks": ranks, "rows": rows, "model": model or {}}
    own |= {name: training.pop(name) for name in ("resume", "dies", "save", "fsdp") if name in training}
    return own | {"training": training}


def start(*runs, **kwargs):
    """The process that does one run after the other, on as many ranks as they say."""
    ranks, launcher = runs[0]["ranks"], [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*launcher, str(SCRIPT), json.dumps(runs)], env=environment, text=True, **kwargs)


def finish(*runs):
    """The trained parameters and the log of each run."""
    process = start(*runs, stderr=subprocess.PIPE)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-6000:]
    folders = [Path(run["out"]) for run in runs]
    return [(load_file(out / "trained.safetensors"), json.loads((out / "log.json").read_text())) for out in folders]


def assert_same_update(mine, theirs, relative=1e-5):
    """Parameters after one step of plain SGD at rate 1 differ from the start by the gradient."""
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=relative, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.slow
def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path):
    def runs(ranks):
        batch = {"per_device_train_batch_size": 8 // ranks}
        return [settings(tmp_path / f"{name}-{ranks}", ranks, model=ALONE[name], **batch, **SGD) for name in ALONE]

    for name, (one, one_log), (two, two_log) in zip(ALONE, finish(*runs(1)), finish(*runs(2)), strict=True):
        assert_same_update(one, two)
        for term in TERMS:
            assert two_log[0][term] == pytest.approx(one_log[0][term], abs=2e-5), (name, term)


def deepspeed_config(stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install deepspeed ninja")
    return str(Path(__file__).parents[2] / "configs" / "deepspeed" / f"{stage}.json")


def losses(log):
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, None), (2, None), (2, "zero2")])
def test_a_killed_run_goes_on_with_the_same_losses(tmp_path, ranks, stage):
    common = {"per_device_train_batch_size": 4 // ranks, "max_steps": 12, "save_steps": 3, "learning_rate": 1e-3}
    if stage is not None:
        common |= {"deepspeed": deepspeed_config(stage), "optim": "adamw_torch"}
    ((_, straight),) = finish(settings(tmp_path / "straight", ranks, 16, **common))
    out = tmp_path / "killed"
    assert start(settings(out, ranks, 16, dies=8, **common), stderr=subprocess.DEVNULL).wait() != 0
    assert {path.name for path in out.iterdir()} == {"checkpoint-3", "checkpoint-6"}
    ((_, resumed),) = finish(settings(out, ranks, 16, resume=True, **common))
    before, after = losses(straight), losses(resumed)
    assert set(after) == set(range(1, 13))
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.slow
def test_what_two_ranks_saved_is_loaded_bit_by_bit(tmp_path):
    common = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3}
    ((trained, _),) = finish(settings(tmp_path / "run", 2, save=True, **common))
    model = LambForAudioCaptioning.from_pretrained(tmp_path / "run" / "final")
    state = dict(model.named_parameters())
    for name, value in trained.items():
        assert torch.equal(state[name], value), name


@pytest.mark.slow
def test_fsdp2_shards_give_the_same_gradients(tmp_path):
    ((one, _),) = finish(settings(tmp_path / "one", per_device_train_batch_size=8, **SGD))
    ((two, _),) = finish(settings(tmp_path / "two", 2, fsdp=True, per_device_train_batch_size=4, **SGD))
    assert_same_update(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_trains_as_ddp_does_and_goes_on(tmp_path, stage):
    config = deepspeed_config(stage)
    common = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "optim": "adamw_torch",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
        "save": True,
    }
    ((plain, log),) = finish(settings(tmp_path / "ddp", 2, 16, max_steps=4, **common))
    finish(settings(tmp_path / stage, 2, 16, max_steps=2, deepspeed=config, **common))
    ((_, sharded),) = finish(settings(tmp_path / stage, 2, 16, max_steps=4, deepspeed=config, resume=True, **common))
    assert losses(sharded) == pytest.approx(losses(log), rel=1e-5)
    loaded = dict(LambForAudioCaptioning.from_pretrained(tmp_path / stage / "final").named_parameters())
    for name, value in plain.items():
        torch.testing.assert_close(loaded[name], value, atol=2e-5, rtol=1e-4)
