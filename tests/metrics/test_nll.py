"""`metrics=[nll]`: figures of a data set for any batch size, and their files."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_lab import likelihood
from diffusion_lab.checkpoint import Run
from diffusion_lab.commands.evaluate import nll_files
from diffusion_lab.data.images import to_float
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.metrics import nll
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.samplers import DDIM, DDPM
from diffusion_lab.schedules import EDM, Cosine, Linear, Schedule
from diffusion_lab.variances import Analytic, FixedLarge

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 1, 3, 4), dtype=np.uint8)
LABELS = np.arange(7) % 3


class Labelled(nn.Module):
    """One weight and an embedding of labels; 3 is the null label."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.tensor(0.5)), nn.Embedding(4, 1)

    def forward(self, x: Tensor, c: Tensor, label: Tensor | None = None) -> Tensor:
        label = torch.full((len(x),), 3) if label is None else label
        return (self.weight * x).tanh() + 0.1 * self.table(label)[..., None, None]


def run_of(schedule: Schedule | None = None, classes: int | None = None, clip: float | None = None) -> Run:
    den = Denoiser(Labelled().eval(), schedule or Cosine(40), PredV(), clip=clip)
    kind = {"_target_": "diffusion_lab.conditions.Unconditional"}
    if classes:
        kind = {"_target_": "diffusion_lab.conditions.Label", "num_classes": classes}
    return Run(den, {"condition": kind}, 0, "raw")


@pytest.mark.parametrize("kind", ["vlb", "ode"])
def test_it_is_the_likelihood_whatever_the_batch(kind: str) -> None:
    """7 images at once, 3 and 1 at a time: the values of the likelihood, to 1e-5 in float32; mean, standard error and the terms
    with theirs from running sums."""
    run = run_of()
    options: dict[str, Any] = {"seed": 2, **({"steps": 5} if kind == "vlb" else {"rtol": 1e-3, "atol": 1e-3})}
    if kind == "vlb":
        want: Any = likelihood.vlb(run.denoiser, to_float(IMAGES), **options)
        parts = torch.cat([want.terms["L_0"][:, None], want.terms["L"], want.terms["L_T"][:, None]], 1)
    else:
        want = likelihood.ode(run.denoiser, to_float(IMAGES), **options)
        parts = torch.stack([want.terms["prior"], want.terms["divergence"]], 1)
    for size in (None, 3, 1):
        got = nll.measure(run, IMAGES, kind=kind, batch_size=size, **options)
        assert got["values"] == pytest.approx(want.bpd.numpy(), abs=1e-5)
        assert (got["bpd"], got["standard_error"]) == pytest.approx(likelihood.average(want.bpd), abs=1e-5)
        assert [row["bpd"] for row in got["terms"]] == pytest.approx(parts.mean(0).tolist(), abs=1e-5)
        errors = (parts.std(0) / 7**0.5).tolist()
        assert [row["standard_error"] for row in got["terms"]] == pytest.approx(errors, abs=1e-5)
        total = sum(row["bpd"] for row in got["terms"]) + (0 if kind == "vlb" else np.log2(127.5))
        assert total == pytest.approx(got["bpd"], abs=1e-9)
    if kind == "vlb":
        assert [row["term"] for row in got["terms"]] == ["L_0", "L", "L", "L", "L", "L_T"]
        assert [row["t"] for row in got["terms"]] == [*want.times.tolist(), 1.0]
        assert got["nfe"] == 5
    else:
        assert got["nfe"] == float(want.evaluations.double().mean())


def test_labels_reach_a_conditional_network() -> None:
    conditional = run_of(classes=3)
    with_labels = nll.measure(conditional, IMAGES, {"label": torch.from_numpy(LABELS)}, steps=4, batch_size=2)
    want = likelihood.vlb(conditional.denoiser, to_float(IMAGES), 4, condition={"label": torch.from_numpy(LABELS)})
    assert with_labels["values"] == pytest.approx(want.bpd.detach().numpy(), abs=1e-5)
    without = nll.measure(conditional, IMAGES, steps=4)["values"]
    assert not np.allclose(without, with_labels["values"], atol=1e-4)


def test_settings_describe_the_likelihood() -> None:
    run = run_of(Linear(), clip=1.0)
    got = nll.measure(run, IMAGES, steps=4, variance=FixedLarge(), last="full", clip=True)
    assert got["settings"] == {
        "grid": "linspace", "eta": 1.0, "clip": True, "steps": 4, "variance": "FixedLarge", "decoder": "discretized",
        "last": "full", "clipped": True,
    }  # fmt: skip
    assert not nll.measure(run, IMAGES, steps=4)["settings"]["clipped"]
    ode = nll.measure(run, IMAGES[:2], kind="ode", divergence="exact", rtol=1e-3)
    assert ode["settings"] == {
        "divergence": "exact", "dequantize": True, "rtol": 1e-3, "atol": 1e-5, "start": 0.001, "clipped": False,
    }  # fmt: skip


def test_the_chain_of_a_sampler() -> None:
    """The bound has the sampler's times, η and variance. Other samplers are refused in one line."""
    run = run_of(Linear())
    ddpm = nll.measure(run, IMAGES, **nll.chain(DDPM(5, FixedLarge(), grid="quadratic"), run.denoiser))
    want = likelihood.vlb(run.denoiser, to_float(IMAGES), 5, FixedLarge(), grid="quadratic")
    assert ddpm["values"] == pytest.approx(want.bpd.detach().numpy(), abs=1e-5)
    assert ddpm["settings"]["variance"] == "FixedLarge"
    assert "grid" not in ddpm["settings"]
    ddim = nll.measure(run, IMAGES, **nll.chain(DDIM(5, eta=0.5), run.denoiser))
    want = likelihood.vlb(run.denoiser, to_float(IMAGES), 5, eta=0.5, grid="trailing")
    assert ddim["values"] == pytest.approx(want.bpd.detach().numpy(), abs=1e-5)
    from diffusion_lab.samplers import Heun

    for sampler in (DDIM(5), DDIM(5, variance=Analytic([1.0], [1.0])), Heun(5)):
        with pytest.raises(ValueError, match="samplers=") as caught:
            nll.chain(sampler, run.denoiser)
        assert "\n" not in str(caught.value)


def test_what_is_written(tmp_path: Path) -> None:
    """A table of every term, one of every image, a plot of the bounds; names that need quotes are quoted."""
    run = run_of()
    measured = {
        "ddpm, 5 steps": nll.measure(run, IMAGES, steps=5),
        "all": nll.measure(run, IMAGES),
        "ode": nll.measure(run, IMAGES, kind="ode", rtol=1e-3),
    }
    nll_files.write(tmp_path / "new", measured)
    with (tmp_path / "new" / "nll_terms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 + 41 + 2
    assert rows[0] == {
        "name": "ddpm, 5 steps", "kind": "vlb", "term": "L_0", "t": "0.025", "bpd": rows[0]["bpd"],
        "standard_error": rows[0]["standard_error"],
    }  # fmt: skip
    for name, m in measured.items():
        terms = [float(row["bpd"]) for row in rows if row["name"] == name]
        assert terms == [row["bpd"] for row in m["terms"]]
    with (tmp_path / "new" / "nll_images.csv").open() as file:
        images = list(csv.DictReader(file))
    assert [float(row["all"]) for row in images] == measured["all"]["values"].tolist()
    assert [row["image"] for row in images] == [str(i) for i in range(7)]
    with Image.open(tmp_path / "new" / "nll_terms.png") as picture:
        assert picture.size[0] > 800
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["nll_images.csv", "nll_terms.csv", "nll_terms.png"]
    nll_files.write(tmp_path / "ode", {"ode": measured["ode"]})
    assert not (tmp_path / "ode" / "nll_terms.png").exists()


def test_plots_of_the_other_curves(tmp_path: Path) -> None:
    """A first time of 0+, a bound of two terms, one image: drawn without a warning."""
    run = run_of(EDM())
    nll_files.write(
        tmp_path, {"edm": nll.measure(run, IMAGES[:1], steps=8), "2": nll.measure(run, IMAGES[:1], steps=2)}
    )
    assert nll.measure(run, IMAGES[:1], steps=2)["terms"][0]["standard_error"] is None
    assert (tmp_path / "nll_terms.png").stat().st_size > 10_000


def test_refusals() -> None:
    run = run_of()
    for match, images, options in (
        ("vlb or ode", IMAGES, {"kind": "nonesuch"}),
        ("uint8", IMAGES.astype(np.float32), {}),
        ("at least one", IMAGES[:0], {}),
        ("rows of label", IMAGES, {"condition": {"label": torch.from_numpy(LABELS[:2])}}),
        ("batch_size", IMAGES, {"batch_size": 0}),
        ("fewer", IMAGES, {"steps": 41}),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            nll.measure(run, images, **options)
        assert "\n" not in str(caught.value)
    broken = Run(Denoiser(lambda x, c: x * torch.nan, Linear(), PredNoise()), run.config, 0, "raw")
    network = nn.Identity()  # has a device
    network.forward = lambda x, c: x * torch.nan  # type: ignore[method-assign]
    broken.denoiser = dataclasses.replace(broken.denoiser, network=network)
    for kind in ("vlb", "ode"):
        with pytest.raises(ValueError, match="NaN or infinity at t="):
            nll.measure(broken, IMAGES, kind=kind, steps=5)
