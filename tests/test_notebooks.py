"""The notebooks run with warnings as errors; each .ipynb contains the cells of its .py and their figures."""

import os
import re
import runpy
import shlex
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest
from command import ROOT, command

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.py"))
LARGEST = 600_000  # bytes of an .ipynb: GitHub renders it, and git stores every version


def _name(path: Path) -> str:
    return path.stem


def test_every_notebook_is_a_pair_and_listed():
    assert [p.stem for p in NOTEBOOKS] == [p.stem for p in sorted(FOLDER.glob("*.ipynb"))]
    assert len(NOTEBOOKS) == 5
    listed = (FOLDER / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"({path.stem}.ipynb)" in listed


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_every_notebook_runs(path, monkeypatch):
    """Run all cells, whose assertions compare formulas with the library, and draw every figure."""
    monkeypatch.chdir(FOLDER)
    plt.switch_backend("Agg")
    with plt.rc_context():
        try:
            runpy.run_path(path.name)
            assert plt.get_fignums()
            for number in plt.get_fignums():
                plt.figure(number).canvas.draw()
        finally:
            plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_the_ipynb_is_what_its_py_gives(path):
    """Both have the same cells; every code cell was run in order without a warning; figures are stored, and the file is small."""
    paired = path.with_suffix(".ipynb")
    notebook = nbformat.read(paired, as_version=4)
    nbformat.validate(notebook)
    written = [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == written, "run `make notebooks`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == sum("plt.show()" in cell.source for cell in code) > 0
    assert os.path.getsize(paired) < LARGEST


SHORT = (
    "trainer=cpu", "trainer.max_steps=2", "validation.every=0", "logger=csv", "callbacks.progress=null",
    "callbacks.samples=null", "data.batch_size=16", "lr_scheduler=constant", "lr_scheduler.warmup=0",
)  # fmt: skip


@pytest.mark.integration
def test_the_command_lines_use_the_classes_of_the_notebook(tmp_path, monkeypatch, capfd):
    """The commands of the last notebook run with a module of its import cell and all its classes."""
    cells = jupytext.read(FOLDER / "05_bring_your_own.py").cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    classes = [source for source in code if source.startswith("class ")]
    assert len(classes) == 4
    (tmp_path / "my_lab.py").write_text("\n\n".join([code[0], *classes]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```bash\n(.*?)```", cells[-1].source, flags=re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines() if line.startswith("python ")]
    assert len(lines) == 5
    for i, (_, door, *arguments) in enumerate(lines):
        if door == "src/train.py":
            extra = [*SHORT, f"hydra.run.dir=run{i}"]
        else:
            arguments[arguments.index("ckpt=latest")] = f"ckpt=run{i - 1}"
            extra = ["n=2", "sampler.steps=2", "out=out"]
        outcome = command(Path(door).stem, [*arguments, *extra], capfd)
        assert outcome.code == 0, f"{arguments}\n{outcome.err}"
    assert (tmp_path / "out" / "grid.png").is_file()
