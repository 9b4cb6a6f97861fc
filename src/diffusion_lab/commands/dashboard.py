"""Create a W&B workspace for the runs of this project (`src/dashboard.py`)."""

import sys
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.errors import ConfigError


class Panel(NamedTuple):
    """One panel of a workspace.

    Attributes:
        kind: "lines", "bars" (the summary of each run), "media", "table" or "differences".
        title: title of the panel.
        keys: name of the logged value; for lines also a regular expression.
        log: whether the y axis is logarithmic.
    """

    kind: str
    title: str
    keys: str
    log: bool = False


# Maps sections to panels. A test checks that an offline run logs the data of each panel.
LAYOUT: dict[str, list[Panel]] = {
    "Training": [
        Panel("lines", "training loss", "train/loss", log=True),
        Panel("lines", "validation loss", "val/loss", log=True),
        Panel("media", "samples", "samples"),
        Panel("media", "estimates of x_0, from noise to data", "trajectory"),
    ],
    "Sample quality": [
        Panel("lines", "distance to the data", "(fd|fid)_.*", log=True),
        Panel("bars", "lowest validation loss", "val/loss"),
        Panel("lines", "confident fraction", "confident_fraction_.*"),
    ],
    "Quality against evaluations (evaluate.py logger=wandb)": [
        Panel("table", "every sampler and step count", "quality"),
        Panel("media", "quality against network evaluations", "quality_plot"),
    ],
    "Loss by noise level": [Panel("lines", "training loss by ln SNR", "train/loss_snr/.*")],
    "Configuration": [Panel("differences", "configurations", "")],
    "Speed": [
        Panel("lines", "images per second", "speed/images_per_s"),
        Panel("lines", "peak memory, GiB", "speed/peak_memory_gib"),
        Panel("lines", "remaining hours", "speed/hours_to_go"),
    ],
    "Gradients (logger.wandb.gradients=500)": [Panel("lines", "histograms", "gradients/.*")],
}


def run(config: DictConfig) -> int:
    """Create the workspace, or with dry=true only print its panels. Return the exit code."""
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    if settings["dry"]:
        for section, panels in LAYOUT.items():
            print(section, *(f"  {p.kind:<12} {p.title}: {p.keys}" for p in panels), sep="\n")
        return 0
    entity = settings["entity"] or _account()
    view = workspace(entity, settings["project"], settings["name"])
    view.save()
    print(f"look at  {view.url}")
    return 0


def workspace(entity: str, project: str, name: str) -> Any:
    """Build the workspace of LAYOUT with wandb-workspaces, without saving it."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def panel(p: Panel) -> Any:
        if p.kind == "lines":
            regular = any(c in p.keys for c in "(*|")
            y: dict[str, Any] = {"metric_regex": p.keys} if regular else {"y": [p.keys]}
            return wr.LinePlot(title=p.title, x="trainer/global_step", log_y=p.log, **y)
        if p.kind == "bars":
            return wr.BarPlot(title=p.title, metrics=[p.keys])
        if p.kind == "media":
            return wr.MediaBrowser(title=p.title, media_keys=[p.keys], num_columns=1)
        if p.kind == "table":
            return wr.WeavePanelSummaryTable(table_name=p.keys)
        return wr.RunComparer(diff_only="split")

    sections = [
        ws.Section(name=title, panels=[panel(p) for p in panels], is_open=i < 2)
        for i, (title, panels) in enumerate(LAYOUT.items())
    ]
    settings = ws.WorkspaceSettings(x_axis="trainer/global_step")
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _account() -> str:
    """Return the default entity of the W&B login. Raises ConfigError without a login or a connection."""
    import wandb

    try:
        return str(wandb.Api(timeout=10).default_entity)
    except Exception as error:  # W&B raises many types for a missing login or connection
        print(f"W&B: {str(error).splitlines()[0]}", file=sys.stderr)
        raise ConfigError("not logged in to W&B, or no connection: run `wandb login`, or write dry=true") from None
