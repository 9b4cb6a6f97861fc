"""Checkpoints, fits, classifiers and exported files of format 1, written before the shell was rebuilt, are still read."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from command import ROOT, command, train

from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.checkpoint.upgrade import FORMAT, upgraded

OLD = ROOT / "tests" / "fixtures" / "format1"
LEARNED, PLAIN = OLD / "learned", OLD / "plain"

# What the commands of that version made of these files, with two threads; kernels differ by a rounding.
IMAGES = {
    "ddpm": ("learned", "sampler=ddpm", "sampler.steps=6"),
    "dpm": ("plain", "sampler=dpm_solver_pp"),
    "npr": ("plain", "sampler=ddpm", "sampler.steps=6", "variance=npr", "guidance=classifier"),
    "cfg": ("learned", "sampler=ddim", "guidance=cfg", "variance=fixed_small"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_images_of_a_seed_are_those_of_before(name, tmp_path, capfd):
    folder, *arguments = IMAGES[name]
    if "guidance=classifier" in arguments:
        arguments.append(f"guidance.ckpt={OLD / 'classifier.pt'}")
    out = tmp_path / "out"
    outcome = command("sample", [f"ckpt={OLD / folder}", "n=8", *arguments, "save_images=false", f"out={out}"], capfd)
    assert outcome.code == 0, outcome.err
    with np.load(out / "samples.npz") as new, np.load(OLD / f"images_{name}.npz") as old:
        assert set(new.files) == set(old.files)
        assert np.abs(new["arr_0"].astype(int) - old["arr_0"].astype(int)).max() <= 1
        assert (new["arr_0"] == old["arr_0"]).mean() > 0.99


def test_an_exported_file_of_format_1_samples_as_its_checkpoint():
    one, two = load_checkpoint(PLAIN), load_checkpoint(OLD / "plain.safetensors")
    assert torch.equal(one.sample(2), two.sample(2))
    assert (one.step, two.weights) == (4, "ema 0.9")


@pytest.mark.integration
@pytest.mark.parametrize("name", ["learned", "plain"])
def test_a_run_of_format_1_goes_on_as_it_would_have(name, tmp_path, capfd):
    """Resumed to the step that it had, so that its configuration is the only thing that could differ: losses are finite and the
    state of the optimizer was taken over (its steps count on)."""
    outcome = train(tmp_path / "run", f"ckpt={OLD / name}", "trainer.max_steps=6", capfd=capfd)
    assert "6 steps done" in outcome.out
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["diffusion_lab"]["format"] == FORMAT
    assert {int(state["step"]) for state in checkpoint["optimizer_states"][0]["state"].values()} == {6}
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["validation"] == {"every": 2, "draws": 8}
    assert config["callbacks"]["ema"]["decay"] == 0.9
    if name == "learned":
        assert config["time_sampler"]["_target_"].endswith(".Importance")
        assert config["model"]["learned_variance"] is True
        assert config["model"]["num_classes"] == 10
    else:
        assert config["lr_scheduler"]["_target_"].endswith(".Constant")
        assert config["clip"]["_target_"].endswith(".NoThreshold")


def test_a_run_begins_from_weights_of_format_1(tmp_path, capfd):
    small = ["model.width=8", "model.multipliers=[1,1]", "model.middle_attention=false"]
    outcome = train(tmp_path / "run", f"init={PLAIN}", *small, "trainer.max_steps=1", capfd=capfd)
    assert "(ema 0.9)" in outcome.out


@pytest.mark.integration
def test_it_is_evaluated_by_its_fit_and_reported(tmp_path, capfd):
    asked = [f"ckpt={PLAIN}", "metrics=[nll]", "samplers=[ddpm]", "steps=[3]", "variance=analytic", "n=4"]
    outcome = command("evaluate", [*asked, f"out={tmp_path / 'out'}"], capfd)
    assert outcome.code == 0, outcome.err
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert np.isfinite(row["metrics"]["nll"])
    shutil.copytree(OLD, tmp_path / "runs")
    outcome = command("report", [str(tmp_path / "runs"), f"out={tmp_path / 'report.html'}"], capfd)
    assert outcome.code == 0, outcome.err
    assert "2 runs" in outcome.out


def test_a_variance_is_fitted_to_it(tmp_path, capfd):
    shutil.copytree(PLAIN, tmp_path / "plain")
    (fit,) = (tmp_path / "plain" / "checkpoints").glob("variance_analytic_*.pt")
    fit.unlink()
    arguments = [f"ckpt={tmp_path / 'plain'}", "variance=analytic", "n=2", "nodes=10"]
    outcome = command("fit_variance", [*arguments, f"hydra.run.dir={tmp_path / 'fit'}"], capfd)
    assert outcome.code == 0, outcome.err
    (again,) = (tmp_path / "plain" / "checkpoints").glob("variance_analytic_*.pt")
    old = torch.load(PLAIN / "checkpoints" / fit.name, weights_only=True)
    new = torch.load(again, weights_only=True)
    assert again.name == fit.name  # named by a hash of the weights and what they mean
    torch.testing.assert_close(new["moments"], old["moments"], rtol=1e-6, atol=1e-8)


def test_the_upgrade_leaves_tensors_and_the_source_alone():
    source = torch.load(PLAIN / "checkpoints" / "last.ckpt", weights_only=True)
    before = json.dumps({k: source[k] for k in ("config", "composed", "overrides")}, default=str)
    new = upgraded(source)
    assert json.dumps({k: source[k] for k in ("config", "composed", "overrides")}, default=str) == before
    assert new["state_dict"] is source["state_dict"]
    assert "rate" not in new["config"]
    assert "lr_scheduler=constant" in new["overrides"]
