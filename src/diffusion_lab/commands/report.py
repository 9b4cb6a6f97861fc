"""Write an HTML report of runs (`src/report.py`)."""

from pathlib import Path

from omegaconf import DictConfig

from diffusion_lab.errors import ConfigError
from diffusion_lab.reporting import print_report, write_report


def run(config: DictConfig) -> int:
    """Write the page, print a summary of its contents, and return the exit code."""
    paths = [Path(str(path)) for path in config.paths]
    if not paths:
        raise ConfigError(
            "no path: write a run, a sweep, an evaluation, or a folder of them, e.g. python src/report.py outputs"
        )
    print_report(write_report(paths, Path(str(config.out)) if config.out else None, config.title))
    return 0
