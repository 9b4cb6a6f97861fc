"""Train a classifier on the clean or noisy images of a data set (`src/train_classifier.py`)."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.checkpoint.classifiers import TrainedClassifier
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.device import device
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import check, instantiate
from diffusion_lab.io import os_errors, write_file
from diffusion_lab.metrics.classifier import Noise, for_dataset
from diffusion_lab.training.classifier import train_classifier


def run(config: DictConfig) -> int:
    """Train a classifier or load it from the cache, write classifier.pt and accuracy.json, and return the exit code."""
    with os_errors():
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        out = Path(settings["out"] or settings["run_dir"])
        if settings["steps"] is not None and not (isinstance(settings["steps"], int) and settings["steps"] >= 1):
            raise ConfigError(f"steps={settings['steps']}: write at least 1, or null for the default")
        check(settings["data"], "data")
        data: DataModule = instantiate({**settings["data"], "limit": None}, "data")
        data.prepare_data()
        data.setup()
        noise = (
            Noise(instantiate(settings["schedule"], "schedule"), settings["schedule"]) if settings["noisy"] else None
        )
        place = device(settings["device"])
        trained = for_dataset(data, Path(settings["cache"]), train_classifier, place, noise, settings["steps"])
        write_file(out / "classifier.pt", trained.path.read_bytes())
        report = {
            "accuracy": trained.accuracy,
            "accuracy_by_ln_snr": trained.by_noise,
            "held_out": data.size("test") or data.size("val"),
            **trained.config,
        }
        write_file(out / "accuracy.json", json.dumps(report, indent=2, ensure_ascii=False))
    _print_summary(trained, report["held_out"], out)
    return 0


def _print_summary(trained: TrainedClassifier, held_out: int, out: Path) -> None:
    if trained.accuracy is None:
        print("accuracy unknown: no images are held out (data.test=0 data.val=0)")
    else:
        print(f"{trained.accuracy:.2%} accuracy on {held_out:,} held-out images")
    for bounds, accuracy in trained.by_noise.items():
        print(f"  ln SNR {bounds:>9}  {accuracy:7.2%}")
    print(f"cached at  {trained.path}\nwritten to {out / 'classifier.pt'}")
