"""A checkpoint of format 2, whose configuration has older names of classes, is sampled and continued as before."""

import numpy as np
import pytest
import torch
from command import ROOT, command, train

from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.checkpoint.upgrade import FORMAT, condition_of_format_1

OLD = ROOT / "tests" / "fixtures" / "format2"
RUN = OLD / "labelled"


def test_it_samples_the_images_that_it_did(tmp_path, capfd):
    arguments = [f"ckpt={RUN}", "n=4", "sampler.steps=3", f"out={tmp_path / 'out'}", "save_images=false"]
    assert command("sample", arguments, capfd).code == 0
    new, old = (np.load(path) for path in (tmp_path / "out" / "samples.npz", OLD / "images.npz"))
    assert np.abs(new["arr_0"].astype(int) - old["arr_0"].astype(int)).max() <= 1  # another processor rounds elsewhere
    assert (new["arr_1"] == old["arr_1"]).all()


@pytest.mark.integration
def test_it_is_continued_in_the_present_format(tmp_path, capfd):
    outcome = train(tmp_path / "run", f"ckpt={RUN}", "trainer.max_steps=6", capfd=capfd)
    assert "6 steps done" in outcome.out
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["diffusion_lab"]["format"] == FORMAT
    targets = str(checkpoint["config"]) + str(checkpoint["composed"])
    assert "diffusion_lab.conditions.Label" in targets
    for old in ("training.condition.", "diffusion_lab.times.", "callbacks.Losses"):
        assert old not in targets


def test_its_fits_are_found_under_their_names():
    """The name of a fit is a hash that contains the condition as older formats wrote it."""
    config = load_checkpoint(RUN).config
    node = condition_of_format_1(config["condition"])
    assert node is not None
    assert node["_target_"] == "diffusion_lab.training.condition.Label"
    assert node["num_classes"] == pytest.approx(10)
