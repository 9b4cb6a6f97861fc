"""What a person can mistype is reported early, in one line, with exit code 2; what the files offer composes."""

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import ROOT, command, composed, unresolved
from omegaconf import OmegaConf

from diffusion_lab import composition
from diffusion_lab.cli.schema import COMMANDS
from diffusion_lab.commands.sample import tasks
from diffusion_lab.instantiation import CONF, instantiate

MISTAKES = {
    "schedule=cosin": "did you mean cosine?",
    "model=unet_mnst": "did you mean unet_mnist?",
    "logger=[csv,wand]": "did you mean wandb?",
    "shedule=linear": "did you mean schedule?",
    "schedule.step=10": "did you mean schedule.steps?",
    "trainer.max_step=10": "did you mean trainer.max_steps?",
    "callbacks.ema.decy=0.9": "did you mean callbacks.ema.decay?",
    "schedule.steps=2.5": "write an integer",
    "trainer.max_steps=many": "write an integer",
    "optimizer.lr=fast": "write a number",
    "data.flip=1": "write true or false",
    "data.batch_size=true": "write an integer",
    "model.multipliers=2": "write a list",
    "+model.attention.more=1": "model.attention.more: there is no such key in a list",
    "sampler.steps=no": "write an integer",
    "++sampler.steps=[1]": "write an integer or null",
    "schedule=linear,cosine": "add --multirun",
    "max_steps": "neither KEY=VALUE nor a flag",
    "a=[1": "cannot read the override",
    "~schedule": "no option of the group schedule",
    "data.limit=${nope}": "cannot be resolved",
    "++trainer.max_steps=abc": "write an integer",
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


@pytest.mark.integration
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


def test_flags_that_exclude_each_other_are_one_line(capfd):
    code, _, err = command("train", ["--multirun", "--cfg", "job"], capfd)
    assert (code, err) == (2, "error: --multirun and --cfg cannot be combined: write one of them\n")


def test_cfg_job_prints_the_configuration(capfd):
    code, out, _ = command("train", ["--cfg", "job"], capfd)
    assert code == 0
    assert "schedule" in out


def test_help_lists_the_options_of_every_choice(capfd):
    code, out, _ = command("train", ["--help"], capfd)
    assert code == 0
    assert "python src/train.py" in out
    for group, some in {
        "schedule": {"cosine", "custom", "edm"},
        "objective": {"edm", "pred_flow"},
        "weighting": {"eps"},
    }.items():
        assert some <= set(composition.options(group))
        assert f"{group}: {', '.join(composition.options(group))}" in out


GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "recipe", "sweep", "base"))


# recipe, experiment, sweep and debug are overlays; a data set chooses its recipe and network; quality adds a callback
OVERLAYS = ("experiment", "debug", "data", "quality")
COMMAND_OF = {"guidance": "sample", "metrics": "evaluate"}  # groups that train.py has not


@pytest.mark.parametrize("group", [*OVERLAYS, *COMMAND_OF])
def test_every_option_of_an_overlay_composes(group):
    for option in composition.options(group):
        assert composed(COMMAND_OF.get(group, "train"), f"{group}={option}")["seed"] == 0


def _node(group: str, option: str) -> dict[str, Any]:
    """The node of an option: the content of its file, or of a composition if the file has a header or recipes set its keys."""
    text = (CONF / group / f"{option}.yaml").read_text()
    if "@package" in text or "defaults:" in text or group in ("callbacks", "lr_scheduler", "optimizer"):
        return unresolved("train", f"{group}={option}")[group]
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


# Row i has the i-th option of every group, so that a composition for each row covers all options.
PLAIN = [group for group in GROUPS if group not in (*OVERLAYS, *COMMAND_OF)]
ROWS = list(itertools.zip_longest(*([(group, option) for option in composition.options(group)] for group in PLAIN)))


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_options_compose_and_write_into_no_other_group(row):
    choices = dict(choice for choice in row if choice)
    lines = [f"{group}={option}" for group, option in choices.items()]
    assert composed("train", *lines)["seed"] == 0
    chosen, default = unresolved("train", *lines), unresolved("train")
    assert chosen == {**default, **{group: _node(group, option) for group, option in choices.items()}}
    assert all(chosen[group] or (group, option) == ("logger", "none") for group, option in choices.items())


BUILT = (
    "schedule",
    "objective",
    "weighting",
    "loss",
    "time_sampler",
    "variance",
    "sampler",
    "condition",
    "lr_scheduler",
    "clip",
    "optimizer",
)
# a class of the user's; a variance that fit_variance.py fills; conditions of data that the digits do not have
UNBUILT = ("custom", "analytic", "tensors", "attributes", "label")


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g in BUILT for o in composition.options(g) if o not in UNBUILT]
)
def test_every_option_builds(group, option):
    assert instantiate(composed("train", f"{group}={option}")[group], group) is not None


def test_no_command_carries_keys_that_it_does_not_read():
    for name, schema in COMMANDS.items():
        assert set(unresolved(name)) <= set(schema.__annotations__)
        assert name == "train" or not {"trainer", "learned_variance"} & set(schema.__annotations__)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_line_a_key_with_the_comment_of_its_file(name, capfd):
    code, out, _ = command(name, ["--help"], capfd)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) <= 190
    shown = {line.split(":", 1)[0].strip(): line for line in lines if line.startswith("  ") and ": " in line}
    config = OmegaConf.create(unresolved(name))
    for key in composition.keys(config):
        leaf = OmegaConf.select(config, key, throw_on_resolution_failure=False)
        if not OmegaConf.is_config(leaf) and not key.endswith(("_convert_", "_partial_")):
            assert key in shown, key
    comments = {
        "train": {
            "schedule.steps": "T",
            "model.blocks": "residual blocks per level of the encoder",
            "trainer.gradient_clip_val": "maximum norm",
        },
        "sample": {
            "strength": "t in (0, 1]",
            "sampler.eta": "0 deterministic",
            "inpaint.resample": "passes over each segment",
        },
        "evaluate": {"repeats": "number of seeds seed, seed + 1"},
        "fit_variance": {"nodes": "analytic: number of t"},
    }
    for key, comment in comments.get(name, {}).items():
        assert f"# {comment}" in shown[key]
    if name == "sample":
        assert "guidance: cfg, classifier, custom, none" in out
        for task in tasks.NEEDS:
            assert f"\n  {task} " in out


def test_old_names_are_refused_with_the_new_ones(capfd):
    for old, new in {
        "times=uniform": "time_sampler=uniform",
        "times.history=3": "time_sampler.history=3",
        "rate.warmup=5": "lr_scheduler.warmup=5",
        "trainer.val_every=5": "validation.every=5",
        "trainer.val_draws=5": "validation.draws=5",
        "trainer.compile=true": "compile=true",
        "model=own": "model=custom",
        "schedule=own": "schedule=custom",
        "+learned_variance=true": "variance=learned",
        "sampler.last_bound=1": "sampler.max_final_noise=1",
        "weights=live": "weights=raw",
        "given=x": "condition_data=x",
    }.items():
        code, _, err = command("train", [old], capfd)
        assert (code, err.count("\n")) == (2, 1)
        assert f"was renamed: write {new}" in err


def test_names_of_other_libraries_get_a_hint(capfd):
    for line, hint in {
        "objective=epsilon": "objective=pred_noise",
        "objective=v_prediction": "objective=pred_v",
        "sampler.timestep_spacing=trailing": "sampler.grid=",
        "schedule.num_train_timesteps=10": "schedule.steps=",
        "clip_sample=true": "clip=static",
        "schedule=squaredcos_cap_v2": "schedule=cosine",
    }.items():
        code, _, err = command("train", [line], capfd)
        assert (code, err.count("\n")) == (2, 1)
        assert f"write {hint}" in err


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
