"""debug=, the printed configuration, what results keep of their making, and files of weights."""

import pytest
import torch
import yaml
from command import TINY, command, train

from diffusion_lab import checkpoint as checkpoints


def test_profile_leaves_where_the_time_went(tmp_path, capfd):
    train(tmp_path / "run", "debug=profile", "trainer.max_steps=2", capfd=capfd)
    (table,) = (tmp_path / "run").glob("*profile*.txt")
    assert "run_training_batch" in table.read_text()


@pytest.mark.filterwarnings("ignore::UserWarning")  # by which torch names the operation, too
def test_anomaly_names_the_operation(tmp_path, capfd, monkeypatch):
    """√|y − y|: the root's derivative at 0 is infinite, the modulus' there 0, and their product no number."""
    from diffusion_lab.losses import L2

    monkeypatch.setattr(L2, "elementwise", lambda self, output, target: (output - output.detach()).abs().sqrt())
    arguments = [*TINY, "debug=anomaly", "trainer.max_steps=2", f"hydra.run.dir={tmp_path / 'run'}"]
    code, _, err = command("train", arguments, capfd)
    assert code == 1
    assert "AbsBackward0' returned nan" in err


def test_overfit_takes_sixteen_images(tmp_path, capfd):
    train(tmp_path / "run", "debug=overfit", "trainer.max_steps=1", "data.batch_size=16", capfd=capfd)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"]["limit"] == 16
    assert config["validation"]["every"] == 0


def test_print_config_says_what_the_run_folder_holds(tmp_path, capfd):
    out = train(tmp_path / "run", "print_config=true", "trainer.max_steps=1", capfd=capfd).out
    assert (tmp_path / "run" / "config.yaml").read_text() in out


def test_a_checkpoint_names_commit_and_libraries(run):
    told = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["diffusion_lab"]
    assert told["torch"] == str(torch.__version__)
    assert {"commit", "python", "lightning", "numpy", "hydra-core", "torchvision"} <= told.keys()


# export ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    from command import code

    file = tmp_path_factory.mktemp("exported") / "model.safetensors"
    assert code("export", [f"ckpt={run}", f"out={file}"]) == 0
    return file


def test_an_exported_file_samples_as_its_checkpoint(run, exported, tmp_path, capfd):
    for name, ckpt in (("a", run), ("b", exported)):
        arguments = [f"ckpt={ckpt}", "n=4", "sampler.steps=3", f"out={tmp_path / name}"]
        assert command("sample", arguments, capfd).code == 0
    assert (tmp_path / "a" / "samples.npz").read_bytes() == (tmp_path / "b" / "samples.npz").read_bytes()
    kept = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert kept["ckpt"] == str(exported)
    a, b = checkpoints.load_checkpoint(run), checkpoints.load_checkpoint(exported)
    assert (a.config, a.step, a.weights) == (b.config, b.step, b.weights)
    assert a.class_names == b.class_names == tuple("0123456789")


@pytest.mark.integration
def test_live_weights_and_diffusers_names(run, tmp_path, capfd):
    live, theirs = tmp_path / "live.safetensors", tmp_path / "theirs.safetensors"
    assert command("export", [f"ckpt={run}", "weights=raw", f"out={live}"], capfd).code == 0
    one, two = (checkpoints.load_checkpoint(p, "raw").denoiser.network.state_dict() for p in (run, live))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert command("export", [f"ckpt={run}", "diffusers=true", f"out={theirs}"], capfd).code == 0
    begun = train(tmp_path / "begun", "condition=label", "trainer.max_steps=1", f"init={theirs}", capfd=capfd)
    assert "1 steps done" in begun.out


@pytest.mark.integration
def test_fine_tuning_begins_from_an_exported_file(exported, tmp_path, capfd):
    out = train(tmp_path / "run", "condition=label", "trainer.max_steps=1", f"init={exported}", capfd=capfd).out
    assert f"weights from {exported} (ema 0.5)" in out


def test_what_cannot_be_exported_or_read(run, exported, tmp_path, capfd):
    broken, foreign = tmp_path / "broken.safetensors", tmp_path / "foreign.safetensors"
    broken.write_bytes(exported.read_bytes()[:1000])
    command("export", [f"ckpt={run}", "diffusers=true", f"out={foreign}"], capfd)
    for name, arguments, said in (
        ("export", [f"ckpt={run}", f"out={exported}"], "write overwrite=true"),
        ("export", [f"ckpt={run}", f"out={tmp_path / 'model.pt'}"], "ends in .safetensors"),
        ("sample", [f"ckpt={foreign}"], "weights without a configuration"),
        ("sample", [f"ckpt={broken}"], "truncated or not a .safetensors file"),
        ("train", [f"ckpt={exported}"], f"write init={exported}"),
    ):
        code, _, err = command(name, [*arguments, f"hydra.run.dir={tmp_path / 'refused'}"], capfd)
        assert code == 2, err
        assert said in err
        assert err.count("\n") == 1
