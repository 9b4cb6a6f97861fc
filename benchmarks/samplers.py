"""What a sampler costs beside the network: 50 steps of the digits network, 256 images, the time outside the network as a share.

Network and sampler are timed in the same run, call by call, so that what drifts with the machine cancels. On a GPU both wait for
each other at every call, which hides nothing of what the processor does: the worst case.
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
    """A network that adds up the seconds spent inside it."""

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
    """The time, after what the device still has to do."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def every(steps: int) -> dict[str, Sampler]:
    """One of each class with `steps` steps and otherwise its defaults, and the options that change the work of a step."""
    found: dict[str, Sampler] = {}
    for name in samplers.__all__:
        cls = getattr(samplers, name)
        if isinstance(cls, type) and issubclass(cls, Sampler) and not inspect.isabstract(cls):
            found[name] = cls(steps=steps) if "steps" in inspect.signature(cls).parameters else cls()
    found["DDIM, eta=1"] = DDIM(steps, eta=1.0)
    found["Heun, s_churn=20"] = Heun(steps, s_churn=20.0)
    found["DPMSolverPP, order=3, corrected"] = DPMSolverPP(steps, 3, corrected=True)
    found["DPMSolverPP, sde"] = DPMSolverPP(steps, sde=True)
    found["UniPC, order=3"] = UniPC(steps, 3)
    return dict(sorted(found.items()))


def measure(sampler: Sampler, denoiser: Denoiser, x: Tensor, rounds: int) -> tuple[float, float, int]:
    """Milliseconds an evaluation inside the network and outside it, of the round with the median share; and the evaluations."""
    clock: Any = denoiser.network
    pairs = []
    for _ in range(rounds + 1):
        clock.seconds, clock.calls = 0.0, 0
        begin = now()
        nfe = sampler(denoiser, x).nfe
        whole = now() - begin
        pairs.append((1e3 * clock.seconds / clock.calls, 1e3 * (whole - clock.seconds) / clock.calls, nfe))
    return sorted(pairs[1:], key=lambda pair: pair[1] / pair[0])[rounds // 2]  # the first one allocates


def cost(quick: bool) -> str:
    """The table."""
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
    head = ["sampler", "evaluations", "network, ms an evaluation", "outside it, ms an evaluation", "share of the time"]
    return f"Digits network, {BATCH} images, random weights.\n\n" + table(head, rows)


if __name__ == "__main__":
    print(cost(quick=False))
