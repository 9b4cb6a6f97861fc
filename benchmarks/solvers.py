"""All samplers and reverse variances on the digits network: Fréchet distance against network evaluations, bits per dimension.

Networks (that of the quick start, and the same with variance=learned), fits and results are kept in outputs/bench and reused, so
that an interrupted run can be continued.
"""

import sys
from pathlib import Path

from common import command, measured, table

HOME = Path("outputs/bench")
PLAIN, LEARNED = HOME / "digits", HOME / "digits_learned"
PARTS = [[5, 10, 20], [50], [1000]]  # numbers of evaluations, the slow ones last
REPEATS = {1000: 1}  # number of seeds, else 3: at few evaluations seeds differ by more than most variances
LONG = PARTS[-1]
STEPS = [10, 50, 1000]
FIXED, FITTED = ["fixed_small", "fixed_large"], ["analytic", "sn", "npr"]
OTHERS = [
    "euler",
    "heun",
    "{heun:{grid:trailing}}",
    "{dpm_solver_pp:{order:1}}",
    "{dpm_solver_pp:{order:2}}",
    "{dpm_solver_pp:{order:3}}",
    "{dpm_solver_pp:{order:3,corrected:true}}",
    "{dpm_solver_pp:{order:2,sde:true}}",
    "{unipc:{order:2}}",
    "{unipc:{order:2,b:bh1}}",
    "{unipc:{order:3}}",
    "euler_maruyama",
    "reverse_diffusion",
    "predictor_corrector",
]
# Solvers of the same ODE agree at 1000 evaluations, where DDIM represents them.
ONCE_CONVERGED = [
    s for s in OTHERS if "sde" not in s and s not in ("euler_maruyama", "reverse_diffusion", "predictor_corrector")
]
ADAPTIVE = ["{ode:{rtol:0.1,atol:0.1}}", "{ode:{rtol:0.01,atol:0.01}}", "{ode:{}}"]


def train_missing(quick: bool) -> None:
    """Train the two networks and the three fits unless they exist."""
    short = ["trainer.max_steps=60", "validation.every=60"] if quick else []
    for folder, choice in ((PLAIN, "variance=fixed_small"), (LEARNED, "variance=learned")):
        if not (folder / "checkpoints" / "last.ckpt").is_file():
            command("train", f"hydra.run.dir={folder}", choice, "logger=csv", "callbacks.progress=null", *short)
    for kind in FITTED:
        if not list((PLAIN / "checkpoints").glob(f"variance_{kind}_*.pt")):
            command("fit_variance", f"ckpt={PLAIN}", f"variance={kind}", *(["n=2", "steps=5"] if quick else []))


def distances(quick: bool) -> str:
    """Return a table of the Fréchet distance in the classifier's features by sampler, variance and evaluations."""
    n, parts = (200, [[5, 10]]) if quick else (1797, PARTS)
    common = [f"n={n}", "metrics=[fd_classifier]", "batch_size=600"]
    budgets = [b for part in parts for b in part]
    table_cells: dict[str, dict[int, str]] = {}

    def add(part: list[int], name: str, ckpt: Path, samplers: list[str], *more: str, suffix: str = "") -> None:
        repeats = REPEATS.get(part[-1], 3)
        selected = samplers if part != LONG else [s for s in samplers if s not in ONCE_CONVERGED]
        rows = measured(
            HOME / "measured" / f"{name}_{part[-1]}_{n}_{repeats}",
            f"ckpt={ckpt}",
            f"samplers=[{','.join(selected)}]",
            f"budget={part}",
            f"repeats={repeats}",
            *common,
            *more,
        )
        for i, row in enumerate(rows):
            cells = table_cells.setdefault(row["sampler"] + suffix, {})
            spread = f" ± {row['spread']['fd_classifier']:.2f}" if repeats > 1 else ""
            cells[part[i % len(part)]] = f"{row['metrics']['fd_classifier']:.2f}{spread}"

    for part in parts:
        for variance in [*FIXED, "learned", *FITTED]:
            ckpt, ancestral = (LEARNED if variance == "learned" else PLAIN), variance in ("fixed_large", "learned")
            samplers = ["ddpm"] if ancestral else ["ddpm", "ddim"]
            add(part, variance, ckpt, samplers, f"variance={variance}", suffix=f", {variance}")
        add(part, "solvers", PLAIN, OTHERS)
    rows = [[name, *(cells.get(b, "") for b in budgets)] for name, cells in table_cells.items()]
    adaptive = [
        f"at {row['nfe']} evaluations {row['metrics']['fd_classifier']:.2f} (`{row['sampler']}`)"
        for row in measured(
            HOME / "measured" / f"ode_{n}", f"ckpt={PLAIN}", f"samplers=[{','.join(ADAPTIVE)}]", *common
        )
    ]
    head = ["sampler", *(f"{b} evaluations" for b in budgets)]
    return table(head, rows) + "\n\nThe adaptive ODE, with step size control: " + ", ".join(adaptive) + "."


def bits(quick: bool) -> str:
    """Return a table of the variational bound by variance and steps."""
    n, counts = (20, [10]) if quick else (360, STEPS)
    rows = []
    for variance in [*FIXED, "learned", *FITTED]:
        ckpt = LEARNED if variance == "learned" else PLAIN
        cells = []
        for steps in counts:
            out = HOME / "measured" / f"nll_{variance}_{steps}_{n}"
            chosen = ["metrics=[nll]", "samplers=[ddpm]", f"steps=[{steps}]", f"variance={variance}"]
            row = measured(out, f"ckpt={ckpt}", f"n={n}", *chosen)[0]
            m = row["metrics"]
            cells.append(f"{m['nll']:.3f} ± {m['nll_std']:.3f}")
        rows.append([variance, *cells])
    return table(["variance", *(f"{k} steps" for k in counts)], rows)


def main(quick: bool) -> str:
    """Return both tables."""
    global HOME, PLAIN, LEARNED
    if quick:
        HOME = Path("outputs/bench/quick")
        PLAIN, LEARNED = HOME / "digits", HOME / "digits_learned"
    train_missing(quick)
    return distances(quick) + "\n\n" + bits(quick)


if __name__ == "__main__":
    print(main(quick="quick" in sys.argv))
