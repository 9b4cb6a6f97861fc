"""The optimal trajectory: which K of all times lose least of the variational bound (Bao et al. 2022, "Analytic-DPM").

With the optimal variance an ancestral step from t to s costs ½ ln(σ²/σ̃²) nats an element, whatever the others are. So the
best subset is a shortest path of a given number of edges, which dynamic programming finds exactly.
"""

import torch
from torch import Tensor

from diffusion_lab.gaussian import posterior
from diffusion_lab.schedules import Schedule
from diffusion_lab.variances.optimal import Analytic, gain

PAIRS = 1 << 20  # at a time, for the memory's sake: a table of 4,000 steps has eight millions


def costs(variance: Analytic, schedule: Schedule, nodes: Tensor) -> Tensor:
    """½ ln(σ²/σ̃²) of the step from nodes[j] to nodes[i], i < j, else ∞; float64 (N, N) for increasing nodes > 0, float64 (N,)."""
    table = torch.full((len(nodes), len(nodes)), torch.inf, dtype=torch.float64)
    covariance = variance.covariance(schedule, nodes)
    for i, j in torch.triu_indices(len(nodes), len(nodes), 1).split(PAIRS, dim=1):
        floor = posterior(schedule, nodes[j], nodes[i]).variance
        table[i, j] = 0.5 * torch.log1p(gain(schedule, nodes[j], nodes[i], floor) * covariance[j] / floor)
    return table


def shortest(table: Tensor, edges: int) -> Tensor:
    """The path of exactly `edges` edges from node 0 to the last that costs least, int64 (edges + 1,), increasing.

    Args:
        table: float64 (N, N), the cost of (i, j); ∞ unless i < j.
        edges: in [1, N − 1].
    """
    total, came = table[0], []
    for _ in range(edges - 1):
        total, best = (total[:, None] + table).min(0)
        came.append(best)
    path = [len(table) - 1]
    for best in reversed(came):
        path.append(int(best[path[-1]]))
    return torch.tensor([0, *reversed(path)])
