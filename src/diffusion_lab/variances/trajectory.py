"""The optimal trajectory: the K times with the smallest variational bound (Bao et al. 2022, "Analytic-DPM").

With the optimal variance an ancestral step from t to s costs ½ ln(σ²/σ̃²) nats an element, independently of the other steps.
The best subset is therefore a shortest path with a given number of edges, which dynamic programming finds exactly.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffusion_lab.gaussian import posterior
from diffusion_lab.schedules import Schedule
from diffusion_lab.variances.optimal import Analytic, gain

PAIRS = 1 << 20  # pairs evaluated at a time, which bounds the memory: 4,000 steps have eight million pairs


def costs(variance: Analytic, schedule: Schedule, nodes: Float64[Tensor, " n"]) -> Float64[Tensor, "n n"]:
    """Return ½ ln(σ²/σ̃²) of the step from nodes[j] to nodes[i] for i < j, ∞ otherwise; nodes > 0 increase."""
    table = torch.full((len(nodes), len(nodes)), torch.inf, dtype=torch.float64)
    covariance = variance.covariance(schedule, nodes)
    for i, j in torch.triu_indices(len(nodes), len(nodes), 1).split(PAIRS, dim=1):
        floor = posterior(schedule, nodes[j], nodes[i]).variance
        table[i, j] = 0.5 * torch.log1p(gain(schedule, nodes[j], nodes[i], floor) * covariance[j] / floor)
    return table


def shortest(table: Float[Tensor, "n n"], edges: int) -> Int64[Tensor, " nodes"]:
    """Return the cheapest path with exactly `edges` edges from node 0 to the last one, (edges + 1,), increasing.

    Args:
        table: (N, N), the cost of (i, j); ∞ unless i < j.
        edges: in [1, N − 1].
    """
    total, predecessors = table[0], []
    for _ in range(edges - 1):
        total, best = (total[:, None] + table).min(0)
        predecessors.append(best)
    path = [len(table) - 1]
    for best in reversed(predecessors):
        path.append(int(best[path[-1]]))
    return torch.tensor([0, *reversed(path)])
