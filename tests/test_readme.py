"""Every command and every program of the README runs: shortened here, at full length in `make test-slow`."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command import ROOT, command
from PIL import Image

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    if line.strip()
]
DDP = "trainer=ddp"
DOORS = [
    f"src/{name}.py"
    for name in ("train", "sample", "evaluate", "fit_variance", "train_classifier", "report", "export", "dashboard")
]

# Shortens a command without changing its meaning; options that the command names itself are left out.
SHORT = (
    "trainer.max_steps=2 validation.every=2 validation.draws=1 trainer.accelerator=cpu logger=csv data.batch_size=8 "
    "callbacks.samples.every=2 callbacks.samples.n=4 sampler.steps=2"
)


def test_the_first_two_commands_are_make_targets():
    assert [c.split("  ")[0].split(" #")[0].strip() for c in COMMANDS[:2]] == ["make train", "make test"]
    for target in ("train", "test"):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_every_command_can_be_run_by_this_file():
    for line in COMMANDS:
        assert line.startswith("make ") or line.split()[1] in DOORS, line


@pytest.mark.integration
@pytest.mark.parametrize("program", [text for kind, text in BLOCKS if kind == "python"])
def test_every_program_runs(program):
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Return a working folder with links to the sources, images in two folders, and a module of custom classes."""
    place = tmp_path_factory.mktemp("workplace")
    (place / "src").symlink_to(ROOT / "src")
    (place / "docs").symlink_to(ROOT / "docs")
    rng = np.random.default_rng(0)
    for name in ("cats/one", "dogs/two"):
        for i in range(20):
            path = place / "pictures" / name.replace("/", f"/{i}-")
            path.parent.mkdir(parents=True, exist_ok=True)
            size = rng.integers(33, 50, 2)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path.with_suffix(".png"))
    network = (ROOT / "tests" / "own_network.py").read_text().replace("Own", "MyNetwork")
    schedule = next(text for kind, text in BLOCKS if kind == "python" and "class Quartic" in text)
    (place / "my_package.py").write_text(f"{network}\n\n{schedule}")
    option = place / "my_conf" / "schedule" / "quartic.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("_target_: my_package.Quartic\nsteps: 500\n")
    return place


def _apart(line: str, place: Path, extra: str = "") -> str:
    """Run a command line in a new process, and return its output."""
    command = [sys.executable, *shlex.split(line)[1:], *extra.split()]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    return done.stdout


def _without_download(line: str) -> bool:
    return "data=mnist" not in line and "ddpm_cifar10" not in line


def _shortening(line: str) -> str:
    own = {part.split("=")[0] for part in line.split() if "=" in part}
    extra = SHORT
    if "latest" in line and "ckpt=" in line:  # the length of a resumed run is above that of the run before
        return "trainer.max_steps=3"
    if DDP in line:
        extra += " trainer.strategy=ddp"
    if "sweep=schedule_objective" in line:
        extra += " objective=pred_v callbacks.quality.n=70 callbacks.quality.share=1e9"
    if "learning_rate_search" in line:
        extra += " hydra.sweeper.trials=2"
    if "debug=fast" in line:
        extra = extra.replace("validation.every=2", "").replace("logger=csv", "")
    if "_target_" in line:
        extra = extra.replace("data.batch_size=8", "data.batch_size=4")
    return " ".join(part for part in extra.split() if part.split("=")[0] not in own)


@pytest.mark.integration
def test_the_readme_s_commands_run_in_its_order(workplace, monkeypatch, capfd):
    """Commands that download a data set are left out: test_options.py composes their options, test_build.py builds them."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    monkeypatch.setenv("NETRC", str(workplace / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    ran = ended = 0
    for line in COMMANDS:
        if line.startswith("make") or not _without_download(line):
            continue
        name = Path(line.split()[1]).stem
        if "--cfg" in line:
            extra = ""
        elif name == "train":
            extra = _shortening(line)
        elif name == "sample":
            extra = "n=2 sampler.steps=2"
        elif name == "fit_variance":
            extra = "n=2 nodes=5"
        elif name == "train_classifier":
            extra = "steps=1"
        elif name in ("export", "dashboard"):
            extra = ""
        else:
            extra = "n=20 steps=[2] batch_size=20"
        while int(time.time()) == ended:  # output folders are named by the second
            time.sleep(0.05)
        if DDP in line:
            _apart(line, workplace, extra)
        elif name == "report":  # no command of Hydra's
            assert "0 left out" in _apart(line, workplace)
        else:
            outcome = command(name, [*shlex.split(line)[2:], *extra.split()], capfd)
            assert outcome.code == 0, f"{line} {extra}\n{outcome.err}"
        ended = int(time.time())
        ran += 1
    assert ran >= 12
    assert len(list((workplace / "outputs" / "multirun").glob("*/*/checkpoints/last.ckpt"))) == 4 + 2 + 2


@pytest.mark.slow
@pytest.mark.parametrize("sweeps", [True, False])
def test_the_readme_s_commands_at_full_length(workplace, monkeypatch, sweeps):
    """Run each command unchanged: 50 and 40 minutes of one core. Only the runs of "Your own parts" are shortened."""
    monkeypatch.setenv("NETRC", str(workplace / "none"))
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    section, own = (README.split(f"## {title}")[1].split("\n## ")[0] for title in ("Many runs", "Your own parts"))
    ran = 0
    for line in COMMANDS:
        if not line.startswith("make") and _without_download(line) and (line in section) == sweeps:
            cut = line in own and "train.py" in line
            extra = "trainer.max_steps=20" if cut else "trainer.accelerator=cpu" if DDP in line else ""
            _apart(line, workplace, extra)
            ran += 1
    assert ran >= (3 if sweeps else 30)


@pytest.mark.slow
def test_the_main_job_at_full_length(workplace, tmp_path):
    """The command of `make train` reaches the loss of the README, and the classifier recognizes its samples as digits."""
    run = tmp_path / "run"
    printed = _apart("python src/train.py", workplace, f"hydra.run.dir={run}")
    loss = float(re.search(r"validation loss ([\d.]+)", printed).group(1))
    assert loss < 0.28
    assert (run / "samples" / "step_0002400.png").is_file()
    _apart("python src/evaluate.py", workplace, f"ckpt={run} split=all out={tmp_path / 'out'}")
    row = json.loads((tmp_path / "out" / "metrics.json").read_text())[0]
    assert row["n"] == 1797
    assert row["metrics"]["confident_fraction"] > 0.6
