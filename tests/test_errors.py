"""A mistake of the user's is a ConfigError and one line; a defect of the package keeps its traceback."""

import ast
from pathlib import Path

from command import command, train

import diffusion_lab
from diffusion_lab.samplers import dormand_prince

SOURCES = sorted(Path(diffusion_lab.__file__).parent.rglob("*.py"))


def test_no_file_raises_a_bare_valueerror():
    """The entry point turns ConfigError alone into a line, so a refusal of another type would show a traceback."""
    bare = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "ValueError"
    ]
    assert not bare


def _defect(outcome, message):
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert message in outcome.err
    assert not any(line.startswith("error: ") for line in outcome.err.splitlines())


def test_a_defect_of_the_package_is_no_mistake_of_the_user_s(tmp_path, capfd, monkeypatch):
    """zip(strict=True) deep in the solver raises ValueError: that is no refusal."""
    train(tmp_path / "run", "trainer.max_steps=1", capfd=capfd)
    monkeypatch.setattr(dormand_prince, "_combine", lambda *_: list(zip([1], [], strict=True)))
    arguments = [f"ckpt={tmp_path / 'run'}", "n=1", "sampler=ode", f"out={tmp_path / 'out'}"]
    _defect(command("sample", arguments, capfd), "zip() argument 2 is shorter")
