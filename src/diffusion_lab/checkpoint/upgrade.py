"""Convert checkpoints of older formats. Format 1 differs in groups, keys and nodes, formats 1 and 2 in class names."""

import copy
from collections.abc import Mapping
from typing import Any

from diffusion_lab import renames

FORMAT = 3  # version of the entries that this project adds to Lightning's checkpoint
CLASSES = {
    "diffusion_lab.guidance.StaticThreshold": "diffusion_lab.clipping.StaticThreshold",
    "diffusion_lab.guidance.DynamicThreshold": "diffusion_lab.clipping.DynamicThreshold",
    "diffusion_lab.models.load_diffusers": "diffusion_lab.interop.diffusers.load_diffusers",
    "diffusion_lab.training.callbacks.Losses": "diffusion_lab.training.callbacks.LossLogger",
    "diffusion_lab.training.callbacks.Quality": "diffusion_lab.training.callbacks.QualityMonitor",
}
MODULES = {
    "diffusion_lab.training.condition": "diffusion_lab.conditions",
    "diffusion_lab.times": "diffusion_lab.time_samplers",
}
LOGGERS: dict[str, dict[str, Any]] = {
    "csv": {
        "_target_": "pytorch_lightning.loggers.CSVLogger",
        "save_dir": "${run_dir}",
        "name": "",
        "version": "",
        "flush_logs_every_n_steps": 100,
    },
    "tensorboard": {
        "_target_": "pytorch_lightning.loggers.TensorBoardLogger",
        "save_dir": "${run_dir}",
        "name": "tensorboard",
        "version": "",
    },
    "wandb": {"_target_": "diffusion_lab.training.loggers.WandbLogger", "save_dir": "${run_dir}"},
}
TRAINER = {
    "_target_": "pytorch_lightning.Trainer",
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}
# Keys of the model that were interpolations in format 1. The command passes them as arguments since format 2.
FILLED = ("num_classes", "learned_variance", "given_channels")


def upgraded(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint of format 1 or 2 to format 3. Tensors are not copied."""
    new = dict(checkpoint)
    if checkpoint["diffusion_lab"]["format"] == 1:
        new["config"] = _configuration(checkpoint["config"])
        if "composed" in checkpoint:
            new["composed"] = _configuration(checkpoint["composed"], unresolved=True)
        if "overrides" in checkpoint:
            new["overrides"] = _overrides(checkpoint["overrides"])
        if "choices" in checkpoint:
            new["choices"] = {
                renames.GROUPS.get(g, g): renames.OPTIONS.get((g, o), o) for g, o in checkpoint["choices"].items()
            }
    for key in ("config", "composed"):
        if key in new:
            new[key] = _with_present_classes(new[key])
    new["diffusion_lab"] = {**checkpoint["diffusion_lab"], "format": FORMAT}
    return new


def _configuration(old: Mapping[str, Any], unresolved: bool = False) -> dict[str, Any]:
    """Convert a configuration of format 1 to format 2. `unresolved` states that it contains interpolations."""
    new: dict[str, Any] = {renames.GROUPS.get(k, k): copy.copy(v) for k, v in old.items() if k != "learned_variance"}
    trainer = dict(new["trainer"])
    new["validation"] = {"every": trainer.pop("val_every"), "draws": trainer.pop("val_draws")}
    new["compile"] = trainer.pop("compile")
    new["trainer"] = {**TRAINER, **trainer}
    new["clip"] = new.get("clip") or {"_target_": "diffusion_lab.clipping.NoThreshold"}
    new["data"] = {k: v for k, v in new["data"].items() if k not in ("seed", "accumulate")}
    condition = dict(new["condition"])
    classes = condition.pop("num_classes", None)
    if not unresolved and condition["_target_"].endswith(".Label"):
        condition["num_classes"] = classes
    if not unresolved and condition["_target_"].endswith(".Attributes"):
        condition["num_attributes"] = classes
    new["condition"] = condition
    if unresolved:
        new["model"] = {k: v for k, v in new["model"].items() if k not in FILLED}
    save_dir = str(new.get("run_dir", "."))
    new["logger"] = {
        name: {**LOGGERS[name], **(node or {}), "save_dir": "${run_dir}" if unresolved else save_dir}
        for name, node in (new.get("logger") or {}).items()
        if name in LOGGERS and node is not None
    }
    for group in ("sampler", "callbacks"):
        new[group] = _with_renamed_keys(new.get(group))
    return new


def _with_present_classes(value: Any) -> Any:
    """Return the containers with the current class names."""
    if isinstance(value, Mapping):
        new = {key: _with_present_classes(child) for key, child in value.items()}
        if "_target_" in new:
            module, _, name = str(new["_target_"]).rpartition(".")
            moved = f"{MODULES[module]}.{name}" if module in MODULES else new["_target_"]
            new["_target_"] = CLASSES.get(str(new["_target_"]), moved)
        return new
    return [_with_present_classes(v) for v in value] if isinstance(value, list | tuple) else value


def _with_renamed_keys(value: Any) -> Any:
    """Return the nodes of format 1 with the current keys, and with a node instead of null for no clipping."""
    if not isinstance(value, Mapping):
        return value
    renamed = {"max_final_noise" if k == "last_bound" else k: _with_renamed_keys(v) for k, v in value.items()}
    if "clip" in renamed and not renamed["clip"]:
        renamed["clip"] = {"_target_": "diffusion_lab.clipping.NoThreshold"}
    return renamed


def _overrides(old: list[str]) -> list[str]:
    """Return overrides of format 1 with current names. In format 1 variance=learned also selected sampler=ddpm."""
    new = []
    chosen = {line.split("=", 1)[0] for line in old}
    for line in old:
        sign, body = (line[: len(line) - len(line.lstrip("+~"))], line.lstrip("+~"))
        key, _, value = body.partition("=")
        if key.startswith("hydra.") or key == "learned_variance":
            continue
        if line == "variance=learned" and "sampler" not in chosen:
            new.append("sampler=ddpm")
        new.append(sign + (renames.renamed(key, value) or body))
    return new


def condition_of_format_1(node: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the node of a condition in format 1, from which the fingerprint of a fit is computed."""
    if node is None:
        return None
    old = {k: v for k, v in node.items() if k != "num_attributes"}
    old["_target_"] = str(old["_target_"]).replace("diffusion_lab.conditions.", "diffusion_lab.training.condition.")
    return {**old, "num_classes": node.get("num_classes", node.get("num_attributes"))}
