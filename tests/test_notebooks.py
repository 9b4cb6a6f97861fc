"""The notebooks run, with warnings as errors, and each .ipynb holds the cells of its .py and their figures."""

import os
import runpy
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest
from command import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.py"))
LARGEST = 600_000  # bytes of an .ipynb, which GitHub shows and git keeps


def _name(path: Path) -> str:
    return path.stem


def test_every_notebook_is_a_pair_and_listed():
    assert [p.stem for p in NOTEBOOKS] == [p.stem for p in sorted(FOLDER.glob("*.ipynb"))]
    assert NOTEBOOKS
    listed = (FOLDER / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"({path.stem}.ipynb)" in listed


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_every_notebook_runs(path, monkeypatch):
    """From top to bottom; their own assertions compare formulas with the library. Then every figure is drawn."""
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
    """The same cells; every code cell was run, in order, without a warning; the figures are there, and the file is small."""
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
