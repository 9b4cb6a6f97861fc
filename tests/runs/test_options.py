"""What a person can mistype is reported early, in one line, with exit code 2; what the files offer composes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command import ROOT, command, composed

from diffusion_lab import composition
from diffusion_lab.instantiation import CONF

MISTAKES = {
    "schedule=cosin": "did you mean cosine?",
    "model=unet_mnst": "did you mean unet_mnist?",
    "logger=[csv,wand]": "did you mean wandb?",
    "shedule=linear": "did you mean schedule?",
    "schedule.step=10": "did you mean schedule.steps?",
    "trainer.max_step=10": "did you mean trainer.max_steps?",
    "callbacks.ema.decy=0.9": "did you mean callbacks.ema.decay?",
    "schedule.steps=2.5": "a whole number is needed",
    "trainer.max_steps=many": "a whole number is needed",
    "optimizer.lr=fast": "a number is needed",
    "data.flip=1": "true or false is needed",
    "data.batch_size=true": "a whole number is needed",
    "model.multipliers=2": "a list is needed",
    "sampler.steps=no": "a whole number is needed",
    "++sampler.steps=[1]": "a whole number or null is needed",
    "schedule=linear,cosine": "add --multirun",
    "max_steps": "neither KEY=VALUE nor a flag",
    "a=[1": "cannot read the override",
    "~schedule": "run needs every group",
    "data.limit=${nope}": "cannot be resolved",
    "++trainer.max_steps=abc": "a whole number is needed",
    "hydra.run.dir=x/${hydra:nothing.at.all}": "cannot be resolved",
}


@pytest.mark.parametrize(("argument", "remedy"), MISTAKES.items())
def test_a_mistake_is_one_line_and_exit_code_2(argument, remedy, capfd, tmp_path):
    run = tmp_path / "run"
    code, out, err = command("train", [f"hydra.run.dir={run}", argument], capfd)
    assert (code, out) == (2, "")
    assert remedy in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not run.exists()


def test_every_value_of_a_sweep_is_checked_before_the_first_job(capfd, tmp_path):
    sweep = tmp_path / "sweep"
    code, _, err = command("train", ["--multirun", "schedule=linear,cosin", f"hydra.sweep.dir={sweep}"], capfd)
    assert code == 2
    assert "schedule=cosin" in err
    assert not sweep.exists()


def test_a_mistake_is_reported_without_importing_torch():
    code = (
        "import sys; sys.argv = ['train.py', 'schedule=cosin']\n"
        "from diffusion_lab.cli import main\n"
        "try: main('train')\n"
        "except SystemExit as stopped: assert stopped.code == 2\n"
        "heavy = {'torch', 'pytorch_lightning', 'wandb', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean cosine?" in done.stderr
    assert time.monotonic() - begin < 60  # a hang, not a speed: what keeps it fast is that nothing heavy is imported


def test_the_output_folder_is_never_written_over(capfd, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    code, _, err = command("train", [f"hydra.run.dir={kept}"], capfd)
    assert code == 2
    assert "overwrite=true" in err
    assert [p.name for p in kept.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("flag", ["--help", "--cfg job"])
def test_information_needs_no_training(flag, capfd):
    code, out, _ = command("train", flag.split(), capfd)
    assert code == 0
    assert "schedule" in out
    if flag == "--help":
        assert "python src/train.py" in out
        for group in (
            "schedule: cosine, custom, edm",
            "objective: custom, edm, pred_flow",
            "weighting: custom, edm, eps",
        ):
            assert group in out


GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "recipe", "sweep", "base"))


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_every_group_composes(group):
    for option in composition.options(group):
        command_of = {"guidance": "sample", "metrics": "evaluate"}
        assert composed(command_of.get(group, "train"), f"{group}={option}")["seed"] == 0


def test_the_default_configuration_is_the_golden_one():
    """A change of a default is a decision: `python tests/runs/test_options.py` writes the file anew."""
    assert composed("train") == yaml.safe_load(GOLDEN.read_text())


GOLDEN = Path(__file__).parent / "default.yaml"


def test_every_group_of_the_surface_is_there():
    for group, names in {
        "schedule": "linear scaled_linear cosine sigmoid vp sub_vp ve edm flow",
        "objective": "pred_noise pred_x0 pred_v pred_mean pred_flow edm",
        "weighting": "native eps x0 truncated_snr min_snr soft_min_snr p2 vlb edm sigmoid",
        "time_sampler": "uniform stratified log_normal logit_normal importance",
        "variance": "fixed_small fixed_large learned analytic sn npr",
        "sampler": "ddpm ddim euler heun dpm_solver_pp unipc euler_maruyama reverse_diffusion predictor_corrector ode ddcm",
        "data": "digits mnist fashion_mnist cifar10 celeba image_folder",
        "model": "unet_digits unet_mnist unet_cifar10 unet_celeba64 unet_classic",
        "condition": "none label",
        "trainer": "auto cpu gpu ddp",
        "logger": "csv wandb tensorboard none",
        "metrics": "fid kid is prdc fd_classifier nll custom",
    }.items():
        assert set(names.split()) <= set(composition.options(group))


def test_the_scripts_are_thin_doors():
    for path in (ROOT / "src").glob("*.py"):
        assert len(path.read_text().splitlines()) < 12


if __name__ == "__main__":
    GOLDEN.write_text(yaml.safe_dump(composed("train"), sort_keys=False, allow_unicode=True))
