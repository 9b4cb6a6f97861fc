"""metrics=[nll]: bits per dimension of held-out images, by the variational bound or the probability-flow ODE."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_lab.commands.evaluate.samplers import SamplerSpec
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.images import Examples
from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics import nll
from diffusion_lab.metrics.nll import Measured
from diffusion_lab.metrics.scores import MOST
from diffusion_lab.samplers import ODE


class Likelihood(NamedTuple):
    """Arguments of `nll.measure`: the kind of likelihood, and options of that kind."""

    kind: str
    options: dict[str, Any]


def kinds(specs: Sequence[SamplerSpec]) -> list[Likelihood | None]:
    """Return the likelihood of each sampler: the variational bound of its chain, the density for `ode`, or None.

    Raises:
        ConfigError: if no sampler has a likelihood.
    """
    kinds: list[Likelihood | None] = []
    refused: ConfigError | None = None
    for entry in specs:
        if isinstance(entry.sampler, ODE):
            kinds.append(Likelihood("ode", {"rtol": entry.sampler.rtol, "atol": entry.sampler.atol}))
            continue
        try:
            kinds.append(Likelihood("vlb", nll.chain(entry.sampler, entry.run.denoiser)))
        except ConfigError as error:
            refused = refused or error
            kinds.append(None)
    if refused is not None and not any(kinds):
        raise ConfigError(f"metrics=nll: {refused}")
    return kinds


def held_out(data: DataModule, settings: Mapping[str, Any]) -> Examples:
    """Return n evenly spaced images of `nll_split`, at most 10,000. Raises ConfigError if the split is empty."""
    examples = data.examples(settings["nll_split"])
    if not len(examples):
        raise ConfigError(
            f"nll_split={settings['nll_split']} is empty: write nll_split=val, or choose a data set with test images"
        )
    n = min(len(examples), settings["n"] or MOST)
    return examples.select(np.unique(np.linspace(0, len(examples) - 1, n).round().astype(np.int64)))


def measured(spec: SamplerSpec, likelihood: Likelihood, images: Examples, settings: Mapping[str, Any]) -> Measured:
    """Compute bits per dimension under the chain or ODE of one sampler, without the other processes."""
    return nll.measure(
        spec.run,
        images.images[:],
        spec.run.condition(images.take(np.arange(len(images)))),
        kind=likelihood.kind,
        seed=settings["seed"],
        batch_size=settings["batch_size"],
        progress=True,
        **likelihood.options,
    )
