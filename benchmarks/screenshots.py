"""`make screenshots ARGS=FOLDER`: screenshots of the report of a folder, docs/report_{light,dark,phone}.png. Requires Chromium.

The documentation shows this sweep, about a quarter of an hour on one core, with an evaluation of each job:

    python src/train.py --multirun schedule=linear,cosine objective=pred_noise,pred_x0,pred_v trainer.max_steps=300 \
        validation.every=30 trainer.log_every_n_steps=10 quality=classifier callbacks.quality.every=60 callbacks.quality.n=500 \
        callbacks.samples.n=25
    python src/evaluate.py ckpt=SWEEP/JOB samplers=[ddim,dpm_solver_pp] steps=[5,10,20] n=500 out=SWEEP/JOB/evaluate
"""

import html
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from diffusion_lab.reporting import write_report

DOCS = Path(__file__).resolve().parents[1] / "docs"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000"),
]
PHONE = 360  # pixels; narrower than a window can be, so the page is shown in a frame
LARGEST = 250_000  # bytes of a picture


def main(arguments: list[str]) -> int:
    """Write the screenshots; return the exit code. The arguments are paths of src/report.py."""
    browser = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if browser is None:
        print(f"error: none of {', '.join(CHROMIUM)} is installed", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        page = place / "report.html"
        write_report([Path(argument) for argument in arguments], page)
        framed = place / "phone.html"
        frame = f'<iframe srcdoc="{html.escape(page.read_text(encoding="utf-8"))}" style="border:0;width:{PHONE}px;height:100vh"'
        framed.write_text(f"<body style='margin:0'>{frame}></iframe>", encoding="utf-8")
        for name, source, width, height, dark in (
            ("light", page, 1200, 1480, False),
            ("dark", page, 1200, 2690, True),
            ("phone", framed, PHONE, 1480, False),
        ):
            out = DOCS / f"report_{name}.png"
            shot = _shot(browser, source, max(width, 600), height + 200, dark, place).crop((0, 0, width, height))
            _few(shot).save(out, optimize=True)
            if out.stat().st_size > LARGEST:
                print(f"warning: {out} takes {out.stat().st_size:,} bytes", file=sys.stderr)
            print(f"look at  {out}")
    return 0


def _shot(browser: str, page: Path, width: int, height: int, dark: bool, place: Path) -> Image.Image:
    """Return a screenshot of the page in a window of that size."""
    shot = place / "shot.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size, profile = f"--window-size={width},{height}", f"--user-data-dir={place / 'profile'}"
    command = [browser, *FLAGS, scheme, size, profile, f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Image.open(io.BytesIO(shot.read_bytes()))


def _few(picture: Image.Image) -> Image.Image:
    """Return the image quantized to 256 colors, which such a page does not exceed."""
    return picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
