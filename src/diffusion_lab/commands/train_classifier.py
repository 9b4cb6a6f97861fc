"""`src/train_classifier.py`: the project's own classifier of a data set, on clean images or on x_t."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.checkpoint.classifiers import TrainedClassifier
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.device import device
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import check, instantiate
from diffusion_lab.io import os_errors, refuse_filled, write_file
from diffusion_lab.metrics import classifier
from diffusion_lab.metrics.classifier import Noise


def run(config: DictConfig) -> int:
    """Trains as configured, or takes what the cache has; writes classifier.pt and accuracy.json; returns the exit code."""
    with os_errors():
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        out = Path(settings["out"] or settings["run_dir"])
        refuse_filled(out, "out", settings["overwrite"])
        if settings["steps"] is not None and not (isinstance(settings["steps"], int) and settings["steps"] >= 1):
            raise ConfigError(f"steps={settings['steps']}: write at least 1, or null for the recipe's number")
        check(settings["data"], "data")
        data: DataModule = instantiate({**settings["data"], "limit": None}, "data")
        data.prepare_data()
        data.setup()
        noise = (
            Noise(instantiate(settings["schedule"], "schedule"), settings["schedule"]) if settings["noisy"] else None
        )
        trained = classifier.for_dataset(
            data, Path(settings["cache"]), device(settings["device"]), noise, settings["steps"]
        )
        write_file(out / "classifier.pt", trained.path.read_bytes())
        report = {
            "accuracy": trained.accuracy,
            "accuracy_by_ln_snr": trained.by_noise,
            "held_out": data.size("test") or data.size("val"),
            **trained.config,
        }
        write_file(out / "accuracy.json", json.dumps(report, indent=2, ensure_ascii=False))
    _show(trained, report["held_out"], out)
    return 0


def _show(trained: TrainedClassifier, held: int, out: Path) -> None:
    if trained.accuracy is None:
        print("no images are held out (data.test=0 data.val=0): the accuracy is not known")
    else:
        print(f"{trained.accuracy:.2%} of {held:,} held-out images are classified right")
    for bounds, accuracy in trained.by_noise.items():
        print(f"  ln SNR {bounds:>9}  {accuracy:7.2%}")
    print(f"kept in  {trained.path}\nwritten to {out / 'classifier.pt'}")
