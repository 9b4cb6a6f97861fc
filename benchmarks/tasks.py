"""`make pictures`: apply the tasks of src/sample.py to images of a checkpoint's test split, for docs/tasks/*.png.

ARGS=ckpt=PATH selects another checkpoint than the latest; sampler.* and guidance.* are passed to the commands, which are printed.
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.pictures import save_png
from diffusion_lab.instantiation import instantiate_untrusted

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "tasks"
STRENGTHS = (0.3, 0.6, 0.9)


def main(arguments: list[str]) -> int:
    """Write the images; return the exit code of the first command that fails, else 0."""
    arguments = arguments if any(a.startswith("ckpt=") for a in arguments) else ["ckpt=latest", *arguments]
    ckpt = next(a for a in arguments if a.startswith("ckpt=")).removeprefix("ckpt=")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _inputs(ckpt, place)
        image = f"image={place}/0.png"
        commands = {
            "interpolate": ["task=interpolate", f"images=[{place}/0.png,{place}/1.png]", "n=10"],
            "encode": ["task=encode", f"image={place}/several"],
            "inpaint": ["task=inpaint", image, f"mask={place}/mask.png", "n=16"],
            "inpaint_once": ["task=inpaint", image, f"mask={place}/mask.png", "n=16", "inpaint.resample=1"],
            "trajectory": ["task=trajectory", "n=4", "sampler.steps=25"],
            **{f"edit_{t}": ["task=edit", image, f"strength={t}", "n=16"] for t in STRENGTHS},
        }
        for name, options in commands.items():
            line = ["src/sample.py", *options, f"out={place}/{name}", *arguments]
            print(shlex.join(["python", *line]), flush=True)
            done = subprocess.run([sys.executable, *line], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return done.returncode
        sheets = {
            "interpolate": ["interpolate/grid.png"],
            "encode": ["encode/sheet.png"],
            "inpaint": ["inpaint/sheet.png", "inpaint_once/sheet.png"],
            "edit": [f"edit_{t}/sheet.png" for t in STRENGTHS],
            "trajectory": ["trajectory/strip.png"],
        }
        for name, parts in sheets.items():
            save_png(DOCS / f"{name}.png", _stacked([place / part for part in parts]))
        save_png(DOCS / "mask.png", np.asarray(Image.open(place / "mask.png")))
        (DOCS / "trajectory.gif").write_bytes((place / "trajectory" / "trajectory.gif").read_bytes())
    print(f"look at  {DOCS}")
    return 0


def _inputs(ckpt: str, place: Path) -> None:
    """Write test images as 0.png, 1.png and several/*.png, and mask.png, whose lower half is generated."""
    run = load_checkpoint(ckpt)
    data: DataModule = instantiate_untrusted(run.config["data"], (), "data")
    data.prepare_data()
    data.setup()
    images = np.asarray(data.images("test")[np.arange(16)]).transpose(0, 2, 3, 1)
    for i, image in enumerate(images):
        save_png(place / "several" / f"{i:02d}.png", image)
    for i in (0, 1):
        save_png(place / f"{i}.png", images[i])
    mask = np.zeros(images.shape[1:3], np.uint8)
    mask[len(mask) // 2 :] = 255
    save_png(place / "mask.png", mask)


def _stacked(paths: list[Path]) -> np.ndarray:
    """Stack images vertically on the background of the sheets."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), (246,) * 3)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return np.asarray(sheet)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
