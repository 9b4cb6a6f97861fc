"""Write run folders in the format of src/train.py and src/evaluate.py without training; open a report in a browser."""

import csv
import functools
import html
import io
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from diffusion_lab import composition

Rows = Sequence[Mapping[str, float]]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
    "--virtual-time-budget=3000",
]


# folders ------------------------------------------------------------------------------------------------------------------


@functools.cache
def _composed(*groups: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (the configuration with unresolved interpolations, group → option)."""
    config = composition.composed("train", groups)
    plain: Any = OmegaConf.to_container(config, resolve=False)
    choices: dict[str, Any] = plain.pop("hydra")["runtime"]["choices"]
    return plain, choices


def make_run(
    folder: Path, overrides: Sequence[str] = (), rows: Rows = (), grid: bytes = b"", ckpt: str | None = None
) -> Path:
    """Write the run folder of a command line; `ckpt` is the file that ckpt=latest resolved to."""
    groups = [line for line in overrides if _is_group(line)]
    composed, choices = _composed(*groups)
    values = OmegaConf.from_dotlist([line for line in overrides if line not in groups])
    config = OmegaConf.merge(composed, values, {"run_dir": str(folder), "ckpt": ckpt})
    plain = OmegaConf.to_container(config, resolve=True)
    write(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    write(folder / ".hydra" / "overrides.yaml", yaml.safe_dump(list(overrides)))
    write(folder / ".hydra" / "hydra.yaml", yaml.safe_dump({"hydra": {"runtime": {"choices": choices}}}))
    write(folder / "metrics.csv", csv_text(rows))
    (folder / "checkpoints").mkdir()
    if grid:
        (folder / "samples").mkdir()
        (folder / "samples" / "step_0000100.png").write_bytes(b"not an image")
        (folder / "samples" / "step_0001000.png").write_bytes(grid)
    return folder


def _is_group(line: str) -> bool:
    key, value = line.split("=", 1)
    return value == "null" or ("." not in key and key not in ("seed", "ckpt"))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def csv_text(rows: Rows) -> str:
    """Format rows as Lightning's CSVLogger does: sorted columns, empty fields for missing values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({name for row in rows for name in row}))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def losses(best: float, steps: int = 100, every: int = 10, at: int = 80) -> list[dict[str, float]]:
    """Return the rows of a run whose lowest val/loss is `best` at step `at`."""
    rows: list[dict[str, float]] = []
    for step in range(every, steps + 1, every):
        head = {"step": step, "epoch": step / 12}
        rows.append({**head, "train/loss": best + 0.3 * (1 - step / steps), "speed/images_per_s": 500 + step})
        rows.append({**head, "val/loss": best + abs(step - at) / steps})
    return rows


def png(width: int, height: int, seed: int = 0) -> bytes:
    """Return a PNG of uniform noise, which does not compress."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def make_evaluation(folder: Path, ckpt: str, values: Mapping[tuple[str, int], float], n: int = 500, **row: Any) -> Path:
    """Write a metrics.json with fd_classifier for each (sampler, nfe); `row` overrides common fields."""
    common = {"n": n, "seed": 0, "split": "train+val", "weights": "ema 0.995", "extractor": "classifier", "seeds": [0]}
    common |= {"data": {"name": "Digits"}, "checkpoint": {"path": ckpt, "step": 100}, "seconds": 1.0, **row}
    rows = [
        {
            "sampler": sampler,
            "steps": nfe,
            "nfe": nfe,
            **common,
            "metrics": {"fd_classifier": v, "confident_fraction": 0.5},
        }
        for (sampler, nfe), v in values.items()
    ]
    write(folder / "metrics.json", json.dumps(rows, indent=2, ensure_ascii=False))
    write(folder / "metrics.csv", "sampler,steps\r\n")
    return folder


# pages --------------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The content of a page.

    Attributes:
        text: the HTML.
        elements: (tag, attributes) of each element.
        tables: cells of the tables by section; "SECTION / more" below a third-level heading.
        codes: the texts of the code elements.
        words: the visible text.
        data: the embedded JSON.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.codes: list[str] = []
        self.words = ""
        self._section, self._cell, self._code, self._skip = "", False, False, ""
        self._raw: dict[str, str] = {}
        self.feed(text)
        self.data: dict[str, Any] = json.loads(self._raw["data"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"] or ""
        elif tag == "h3":
            self._section += " / more"
        elif tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        elif tag in ("td", "th"):
            self._cell = True
            self.tables[self._section][-1].append("")
        elif tag == "code":
            self._code = True
            self.codes.append("")
        elif tag in ("script", "style"):
            self._skip = attributes.get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False
        elif tag == "code":
            self._code = False
        elif tag in ("script", "style"):
            self._skip = ""

    def handle_data(self, data: str) -> None:
        if self._skip:
            self._raw[self._skip] = self._raw.get(self._skip, "") + data
            return
        self.words += data
        if self._cell:
            self.tables[self._section][-1][-1] += data
        if self._code:
            self.codes[-1] += data

    def column(self, name: str, section: str = "runs") -> dict[str, str]:
        """Return first cell → the cell below the heading `name`, for each row."""
        head, *rows = self.tables[section]
        return {row[0]: row[head.index(name)] for row in rows}

    @property
    def commands(self) -> list[str]:
        return [code for code in self.codes if code.startswith("python src/train.py")]


# a browser ----------------------------------------------------------------------------------------------------------------


def chromium() -> str:
    """Return the path of an installed browser. Without one the test is skipped; in CI it fails."""
    browser = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if browser is None:
        message = f"none of {', '.join(CHROMIUM)} is installed: no browser opens the report"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return browser


def open_page(page: Path, folder: Path, fragment: str = "") -> tuple[str, str]:
    """Return (the document after its scripts ran, the messages of the console)."""
    command = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, errors="replace")
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def frame_page(page: Path, width: int, script: str) -> Path:
    """Write a page that shows `page` in a frame of `width` pixels and runs `script` on it; return its path.

    In the script, `page` is the window of the frame. Its return value is written as JSON into the element `result`. The frame
    uses srcdoc, because a frame with a file: address is not accessible.
    """
    source = html.escape(page.read_text(encoding="utf-8"))
    out = page.with_name("framed.html")
    inside = f"const page = document.getElementById('frame').contentWindow; const result = await (async () => {{ {script} }})();"
    call = (
        f"async function look() {{ {inside} document.getElementById('result').textContent = JSON.stringify(result); }}"
    )
    out.write_text(
        f"<!doctype html><meta charset=utf-8><pre id=result></pre><script>{call}</script>"
        f'<iframe id=frame style="width:{width}px;height:900px;border:0" onload="look()" srcdoc="{source}"></iframe>',
        encoding="utf-8",
    )
    return out


def script_result(document: str) -> Any:
    """Return the value that the script of `frame_page` returned."""
    return json.loads(html.unescape(document.split('<pre id="result">')[1].split("</pre>")[0]))
