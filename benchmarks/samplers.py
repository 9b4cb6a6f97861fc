"""Overhead of the samplers: share of the time outside the network, for 50 steps of the digits network and 256 images.

Network and sampler are timed in the same run, so that drifts of the machine cancel. On a GPU, every call is synchronized, so that
CPU time is not hidden: the worst case.
"""

import inspect
import time
from typing import Any

import torch
from common import configuration, network, table
from torch import Tensor, nn

from diffusion_lab import samplers
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.instantiation import instantiate
from diffusion_lab.noise import normal
from diffusion_lab.samplers import DDIM, DPMSolverPP, Heun, Sampler, UniPC, prior

BATCH = 256
GPU = torch.cuda.is_available()  # queried once: each query takes a quarter of a millisecond


class Clocked(nn.Module):
    """Wrap a network and sum the seconds spent in its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seconds, self.calls = network, 0.0, 0

    def forward(self, x: Tensor, c: Tensor, **condition: Tensor) -> Tensor:
        begin = now()
        y: Tensor = self.network(x, c, **condition)
        self.seconds += now() - begin
        self.calls += 1
        return y


def now() -> float:
    """Return the time after pending work of the device."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def every(steps: int) -> dict[str, Sampler]:
    """Return one sampler of each class with `steps` steps, and further ones with options that change the cost of a step."""
    instances: dict[str, Sampler] = {}
    for name in samplers.__all__:
        cls = getattr(samplers, name)
        if isinstance(cls, type) and issubclass(cls, Sampler) and not inspect.isabstract(cls):
            instances[name] = cls(steps=steps) if "steps" in inspect.signature(cls).parameters else cls()
    instances["DDIM, eta=1"] = DDIM(steps, eta=1.0)
    instances["Heun, s_churn=20"] = Heun(steps, s_churn=20.0)
    instances["DPMSolverPP, order=3, corrected"] = DPMSolverPP(steps, 3, corrected=True)
    instances["DPMSolverPP, sde"] = DPMSolverPP(steps, sde=True)
    instances["UniPC, order=3"] = UniPC(steps, 3)
    return dict(sorted(instances.items()))


def measure(sampler: Sampler, denoiser: Denoiser, x: Tensor, rounds: int) -> tuple[float, float, int]:
    """Return milliseconds per evaluation inside and outside the network, for the round of median share; and the evaluations."""
    clock: Any = denoiser.network
    pairs = []
    for _ in range(rounds + 1):
        clock.seconds, clock.calls = 0.0, 0
        begin = now()
        nfe = sampler(denoiser, x).nfe
        whole = now() - begin
        pairs.append((1e3 * clock.seconds / clock.calls, 1e3 * (whole - clock.seconds) / clock.calls, nfe))
    return sorted(pairs[1:], key=lambda pair: pair[1] / pair[0])[
        rounds // 2
    ]  # without the first round, which allocates memory


def cost(quick: bool) -> str:
    """Return the table."""
    config = configuration()
    device = torch.device("cuda" if GPU else "cpu")
    clocked = Clocked(network(config)[0].eval()).to(device)
    denoiser = Denoiser(clocked, instantiate(config["schedule"]), instantiate(config["objective"]))
    noise = normal((1, 8, 8), seed=0, index=torch.arange(BATCH, device=device))
    x, rows = prior(denoiser.schedule, noise), []
    for name, sampler in every(8 if quick else 50).items():
        try:
            sampler.check(denoiser)
        except ValueError as refusal:
            rows.append([name, "—", "—", "—", f"refused: {refusal}"])
            continue
        inside, outside, nfe = measure(sampler, denoiser, x, 1 if quick else 5)
        share = outside / (inside + outside)
        rows.append([name, str(nfe), f"{inside:.2f}", f"{outside:.3f}", f"{share:.1%}"])
    head = ["sampler", "evaluations", "network, ms per evaluation", "outside, ms per evaluation", "share of the time"]
    return f"Digits network, {BATCH} images, random weights.\n\n" + table(head, rows)


if __name__ == "__main__":
    print(cost(quick=False))
