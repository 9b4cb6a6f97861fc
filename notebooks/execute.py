"""Run the notebooks and write an .ipynb with outputs next to each .py: `make notebooks`, or pass file names as arguments."""

import base64
import io
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

from diffusion_lab.io import write_file

HERE = Path(__file__).resolve().parent


def smaller(png: str) -> str:
    """Return a base64 PNG quantized to 256 colors, a third of the size."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def execute(path: Path) -> nbformat.NotebookNode:
    """Return the notebook of a .py file with the outputs of its cells.

    Raises:
        ValueError: a cell prints to stderr (a warning).
    """
    notebook = jupytext.read(path)
    options = {"kernel_name": "python3", "startup_timeout": 300, "timeout": 600, "record_timing": False}
    NotebookClient(notebook, resources={"metadata": {"path": str(HERE)}}, **options).execute()
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # jupytext's ids are random and would change at every run
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise ValueError(f"{path.name}, cell {i}: {output['text']}")
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = smaller(output["data"]["image/png"])
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or sorted(HERE.glob("[0-9]*.py")):
        text = nbformat.writes(execute(path))
        write_file(path.with_suffix(".ipynb"), (text + "\n").encode())
        print(f"{path.stem}.ipynb: {len(text) / 1000:.0f} kB")
