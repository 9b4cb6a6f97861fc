"""Convert tensors to uint8, and write PNG files, animations and sheets of captioned grids."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_lab.io import replacing


def to_uint8(images: Tensor) -> Tensor:
    """Convert float images in [−1, 1] to uint8 of the same shape.

    x·127.5 + 128 is clamped and truncated, which maps k/127.5 − 1 to k exactly.
    """
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 (H, W), (H, W, 1) or (H, W, 3) atomically as PNG. The folder is created if necessary."""
    squeezed = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    with replacing(path) as partial:
        Image.fromarray(squeezed).save(partial, format="PNG")


class Panel(NamedTuple):
    """One grid of a sheet."""

    caption: str
    images: Tensor  # float (N, C, H, W) in [−1, 1], C = 1 or 3
    columns: int | None = None  # None for a square grid


_GAP, _MARGIN, _PAPER, _INK = 2, 14, 246, (40, 40, 40)


def grid(images: Tensor, columns: int | None = None, min_side: int = 40) -> np.ndarray:
    """Arrange images (N, C, H, W) in [−1, 1] in a grid, uint8 (H', W', 3).

    Images are enlarged by an integer factor so that their longer side has at least `min_side` pixels.
    """
    n, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    zoom = max(1, math.ceil(min_side / max(height, width)))
    pixels = to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    tiles = pixels.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).cpu().numpy()
    height, width = height * zoom, width * zoom
    out = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), _PAPER, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * (height + _GAP), (i % columns) * (width + _GAP)
        out[y : y + height, x : x + width] = tile
    return out


def class_grid(images: Tensor, labels: Tensor, max_images: int) -> np.ndarray:
    """Arrange images in one row per class, with its label at the left; uint8 (H', W', 3).

    Args:
        images: images (N, C, H, W) in [−1, 1].
        labels: labels, int64 (N,). Rows are in the order of their first occurrence.
        max_images: maximum number of images, except that each class has at least one.
    """
    order = list(dict.fromkeys(labels.tolist()))
    largest = max(int((labels == label).sum()) for label in order)
    columns = max(1, min(largest, max_images // len(order)))
    empty = torch.full((1, *images.shape[1:]), _PAPER / 127.5 - 1)
    rows = []
    for label in order:
        row = images[labels == label][:columns]
        rows += [row, empty.expand(columns - len(row), -1, -1, -1)]
    picture = grid(torch.cat(rows), columns)
    font = ImageFont.load_default(13)
    indent = _GAP + 4 + max(int(font.getlength(str(label))) for label in order)
    sheet = Image.new("RGB", (picture.shape[1] + indent, picture.shape[0]), (_PAPER,) * 3)
    sheet.paste(Image.fromarray(picture), (indent, 0))
    height, draw = (picture.shape[0] + _GAP) / len(order), ImageDraw.Draw(sheet)
    for i, label in enumerate(order):
        draw.text((2, (i + 0.5) * height - _GAP / 2), str(label), fill=_INK, font=font, anchor="lm")
    return np.asarray(sheet)


def save_animation(path: Path, frames: Sequence[np.ndarray], milliseconds: int = 80, last: int = 1500) -> None:
    """Write an animated GIF of uint8 frames (H, W, 3) atomically. The last frame is shown for `last` milliseconds."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    durations = [milliseconds] * len(others) + [last]
    with replacing(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def save_sheet(path: Path, panels: Sequence[Panel]) -> None:
    """Write panels with captions to a PNG: those with columns=None side by side, the others below, one per row."""
    font = ImageFont.load_default(13)
    top = [(panel.caption, grid(panel.images)) for panel in panels if panel.columns is None]
    below = [(panel.caption, grid(panel.images, panel.columns)) for panel in panels if panel.columns is not None]
    line = 20
    rows = ([top] if top else []) + [[strip] for strip in below]
    caption_width = {caption: math.ceil(font.getlength(caption)) for row in rows for caption, _ in row}
    width = max(
        sum(max(p.shape[1], caption_width[caption]) for caption, p in row) + _MARGIN * (len(row) + 1) for row in rows
    )
    height = sum(max(p.shape[0] for _, p in row) + line + _MARGIN for row in rows) + _MARGIN
    sheet = Image.new("RGB", (width, height), (_PAPER,) * 3)
    draw = ImageDraw.Draw(sheet)
    y = _MARGIN // 2
    for row in rows:
        x = _MARGIN
        for caption, picture in row:
            draw.text((x, y), caption, fill=_INK, font=font)
            sheet.paste(Image.fromarray(picture), (x, y + line))
            x += max(picture.shape[1], caption_width[caption]) + _MARGIN
        y += max(p.shape[0] for _, p in row) + line + _MARGIN
    save_png(path, np.asarray(sheet))
