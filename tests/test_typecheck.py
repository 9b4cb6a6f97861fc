"""The runtime type checks of the tests are active, and cost nothing outside them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from typecheck import CHECKED

import diffusion_lab
from diffusion_lab import likelihood
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.gaussian import kl
from diffusion_lab.losses import L2, diffusion_loss
from diffusion_lab.objectives import PredV
from diffusion_lab.schedules import Cosine
from diffusion_lab.variances import FixedSmall
from diffusion_lab.weightings import Native

PACKAGE = Path(diffusion_lab.__file__).parent


def test_checked_modules_exist() -> None:
    assert [name for name in CHECKED if not ((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file())] == []


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    """Two times for three images, a channel too many, an integer time, an image without channels."""
    x, t = torch.zeros(3, 1, 4, 4), torch.full((3,), 0.5)
    denoiser = Denoiser(lambda x, c: x, Cosine(), PredV())
    for call in (
        lambda: denoiser(x, t[:2]),
        lambda: denoiser(x[:, 0], t),
        lambda: denoiser(x, t.long()),
        lambda: PredV().target(Cosine(), t, x, x.expand(-1, 2, -1, -1)),
        lambda: diffusion_loss(denoiser, Native(), L2(), x, x, t[:2]),
        lambda: FixedSmall()(Cosine(), t, t[:2], denoiser(x, t)),
        lambda: kl(x, t[:2], x, t[:2]),
        lambda: likelihood.vlb(denoiser, x, 3, index=torch.arange(2)),
    ):
        with pytest.raises(TypeCheckError):
            call()  # type: ignore[no-untyped-call]


@pytest.mark.integration
def test_beartype_is_not_imported_outside_the_tests() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module('diffusion_lab.' + name)\n"
    code += "sys.exit('beartype' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, *CHECKED], check=True, timeout=120)
