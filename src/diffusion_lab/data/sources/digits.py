"""Handwritten digits included in scikit-learn: 1,797 grayscale images of 8×8."""

from pathlib import Path

import numpy as np

from diffusion_lab.data.images import Examples
from diffusion_lab.data.sources.base import Dataset, Source


class Digits(Source):
    """Handwritten digits (Alpaydin & Kaynak 1998), with levels k = 0 … 16 mapped to round(k·255/16).

    Nothing is downloaded, and there is no official test part.
    """

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        """See `Source.load`. No argument is used."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.rint(digits.images[:, None] * 255 / 16).astype(np.uint8)
        return Dataset(Examples(images, digits.target.astype(np.int64)), tuple("0123456789"))
