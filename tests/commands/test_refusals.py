"""Bad input gets one line with the remedy and exit code 2, before training where it can be known before."""

import collections
import io
import os
import shutil
import socket
import zipfile

import pytest
import torch
from command import TINY, command, train
from PIL import Image

from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.checkpoint.archive import sealed
from diffusion_lab.training import loggers
from diffusion_lab.training.callbacks import Checkpoints

REFUSED = {
    ("schedule=linear", "schedule.steps=10"): "schedule.steps=21 or more, or schedule=cosine",
    ("schedule.zero_terminal_snr=true", "objective=pred_noise"): "objective=pred_v",
    ("variance=fixed_large",): "sampler=ddpm",
    ("sampler.steps=2000",): "write fewer steps",
    ("sampler.grid=middle",): "write one of leading, trailing",
    ("sampler.grid=uniform_lambda", "schedule.zero_terminal_snr=true"): "grid=trailing",
    ("model.attention=[5]",): "attention",
    ("model.groups=5",): "groups",
    ("trainer.precision=16-mixed",): "bf16-mixed",
    ("trainer.precision=8",): "32-true",
    ("trainer.accelerator=gpu",): "trainer=cpu",
    ("data.batch_size=5", "trainer.accumulate_grad_batches=2"): "batch",
    ("condition=label", "data.num_classes=0"): "condition=none",
    ("condition=label", "condition.drop=1"): "condition.drop",
    ("data.num_classes=9",): "data.num_classes=10",
    ("data.val=1.5",): "val",
    ("init=nowhere.ckpt",): "no checkpoint at nowhere.ckpt",
    ("ckpt=nowhere.ckpt",): "no checkpoint at nowhere.ckpt",
    ("callbacks.ema.decay=2",): "callbacks.ema.decay",
    ("callbacks.losses.edges=[2,1]",): "must increase",
    ("model._target_=somewhere.Net",): "somewhere",
    ("model=custom",): "model._target_=",
    ("logger=wandb", "logger.wandb.mode=offlin"): "auto, online or offline",
}


def _refused(outcome, remedy):
    assert outcome.code == 2, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in outcome.err
    assert remedy in lines[0]


@pytest.mark.parametrize(("arguments", "remedy"), REFUSED.items(), ids=" ".join)
def test_a_combination_that_cannot_be_is_refused_before_training(arguments, remedy, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    given = {b.split("=")[0] for b in arguments}
    tiny = [a for a in TINY if a.split("=")[0] not in given and not ("model" in given and a.startswith("model."))]
    _refused(command("train", [*tiny, "trainer.max_steps=1", f"hydra.run.dir={run}", *arguments], capfd), remedy)
    assert not run.exists()


def test_files_that_are_no_whole_checkpoint(tmp_path, capfd):
    train(tmp_path / "run", "trainer.max_steps=1", capfd=capfd)
    whole = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "short.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("readme", "a zip")
    (tmp_path / "empty").mkdir()
    for name, reason in {
        "short.ckpt": "truncated",
        "text.ckpt": "truncated",
        "other.ckpt": "not a checkpoint of diffusion-lab",
        "zip.ckpt": "cannot be read",
        "empty": "does not contain checkpoints/last.ckpt",
        "none.ckpt": "no checkpoint at",
    }.items():
        _refused(command("sample", [f"ckpt={tmp_path / name}", f"out={tmp_path / 'out'}"], capfd), reason)
        with pytest.raises(ValueError, match=reason):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "out").exists()


class Payload:
    """Would run a command when unpickled."""

    def __reduce__(self):
        return (os.system, ("touch was-here",))


def test_a_checkpoint_cannot_run_code(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", "trainer.max_steps=1", capfd=capfd)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    good = torch.load(path, weights_only=True)

    torch.save(sealed({**good, "extra": Payload()}), tmp_path / "pickle.ckpt")
    with pytest.raises(ValueError, match="tensors and plain values"):
        load_checkpoint(tmp_path / "pickle.ckpt")

    for target in ("os.system", "diffusion_lab.io.os.system", "torch.nn.Linear", "diffusion_lab.cli.main"):
        torch.save(
            sealed({**good, "config": {**good["config"], "model": {"_target_": target}}}), tmp_path / "named.ckpt"
        )
        with pytest.raises(ValueError, match="not a class of this package"):
            load_checkpoint(tmp_path / "named.ckpt")
    later = "${oc.create:'{_target_: builtins.print, _args_: [here]}'}"  # becomes a node when it is resolved
    hidden = {"_target_": "diffusion_lab.models.External", "module": later}
    torch.save(sealed({**good, "config": {**good["config"], "model": hidden}}), tmp_path / "hidden.ckpt")
    with pytest.raises(ValueError, match="interpolation"):
        load_checkpoint(tmp_path / "hidden.ckpt")
    torch.save(sealed({**good, "composed": {**good["composed"], "model": hidden}}), tmp_path / "resumed.ckpt")
    resumed = [f"ckpt={tmp_path / 'resumed.ckpt'}", "trainer.max_steps=2", f"hydra.run.dir={tmp_path / 'again'}"]
    _refused(command("train", resumed, capfd), "not a class of this package")
    nested = {"_target_": "diffusion_lab.models.External", "module": {"_target_": "torch.nn.Identity"}}
    torch.save(sealed({**good, "config": {**good["config"], "model": nested}}), tmp_path / "nested.ckpt")
    with pytest.raises(ValueError, match=r"trust=\[torch.nn\]"):
        load_checkpoint(tmp_path / "nested.ckpt")
    assert not (tmp_path / "was-here").exists()


def test_a_network_of_ones_own_is_trained_and_trusted(tmp_path, capfd):
    network = ("model=custom", "model._target_=own_network.Own")
    arguments = [a for a in TINY if not a.startswith("model.")]
    run = tmp_path / "run"
    outcome = command("train", [*arguments, *network, "trainer.max_steps=1", f"hydra.run.dir={run}"], capfd)
    assert outcome.code == 0, outcome.err
    with pytest.raises(ValueError, match=r"trust=\[own_network\]"):
        load_checkpoint(run)
    assert load_checkpoint(run, trust=["own_network"]).sample(2).shape == (2, 1, 8, 8)


def test_a_finished_run_and_a_foreign_network_are_not_resumed(tmp_path, capfd):
    train(tmp_path / "run", "trainer.max_steps=2", capfd=capfd)
    again = [f"ckpt={tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'again'}"]
    _refused(command("train", again, capfd), "trainer.max_steps=")
    wrong = [*TINY, f"init={tmp_path / 'run'}", "model.width=16", f"hydra.run.dir={tmp_path / 'wrong'}"]
    _refused(command("train", wrong, capfd), "do not fit this network")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_not_enough_disk_is_known_before_training(tmp_path, capfd, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    _refused(command("train", [*TINY, f"hydra.run.dir={tmp_path / 'run'}"], capfd), "not enough disk")


def test_a_full_disk_while_writing_keeps_the_checkpoint_before(tmp_path, capfd, monkeypatch):
    written = []
    original = os.replace

    def full(source, target):
        if str(target).endswith("last.ckpt"):
            written.append(target)
            if len(written) == 2:
                raise OSError(28, "No space left on device")
        return original(source, target)

    monkeypatch.setattr(os, "replace", full)
    run = tmp_path / "run"
    arguments = [*TINY, "trainer.max_steps=4", "callbacks.checkpoints.every=2", f"hydra.run.dir={run}"]
    _refused(command("train", arguments, capfd), "No space left on device")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["last.ckpt"]


def test_one_s_own_images_empty_and_broken(tmp_path, capfd):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(picture, "PNG")
    (broken / "a.png").write_bytes(picture.getvalue())
    (broken / "b.png").write_bytes(picture.getvalue()[:60])
    base = [
        *TINY,
        "data=image_folder",
        "data.image_size=[8,8]",
        "model=unet_digits",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    _refused(command("train", [*base, f"data.root={empty}"], capfd), str(empty))
    _refused(command("train", [*base, f"data.root={broken}"], capfd), "b.png")


def test_wandb_online_without_a_connection(tmp_path, capfd, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    asked = [
        *(a for a in TINY if a != "logger=csv"),
        "logger=wandb",
        "logger.wandb.mode=online",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    _refused(command("train", asked, capfd), "logger.wandb.mode=offline")
    with pytest.warns(UserWarning, match="does not answer"):
        assert loggers.runs_offline("auto")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert loggers.runs_offline("auto")
    _refused(command("train", asked, capfd), "wandb login")


def test_sampling_refuses_what_cannot_be(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(tmp_path / "run", "trainer.max_steps=1", capfd=capfd)
    ckpt = f"ckpt={tmp_path / 'run'}"
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for arguments, remedy in {
        ("n=0",): "n=0: write an integer in [1, ",
        ("labels=[1]",): "condition=label",
        ("weights=0.5",): "ema, raw",
        ("sampler=ddpm", "sampler.steps=1001"): "write fewer steps",
        ("batch_size=0",): "batch_size=0: write an integer in [1, ",
        ("seed=-1",): "seed=-1: write an integer in [0, ",
        (f"out={full}",): "overwrite=true",
        ("device=cuda",): "device=cpu",
        ("n=null",): "n",
        ("task=dream",): "task=generate",
    }.items():
        out = [] if any(a.startswith("out=") for a in arguments) else [f"out={tmp_path / 'out'}"]
        _refused(command("sample", [ckpt, *out, *arguments], capfd), remedy)
    assert not (tmp_path / "out").exists()
    _refused(command("sample", [f"out={tmp_path / 'out'}"], capfd), "ckpt=PATH")
    assert [p.name for p in full.iterdir()] == ["notes.txt"]
    assert command("sample", [ckpt, f"out={tmp_path / 'out'}", "n=1", "sampler.steps=1"], capfd).code == 0
    assert not (tmp_path / "outputs").exists()  # no dated folder beside the one asked for


def test_checkpoints_are_written_at_least_every_step():
    with pytest.raises(ValueError, match="at least 1 step"):
        Checkpoints("somewhere", every=0)
