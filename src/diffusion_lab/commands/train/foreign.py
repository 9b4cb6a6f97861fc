"""What the configuration in a checkpoint may not decide: places to write to. It may be anybody's.

Classes to trust and the values of `init`, `overwrite` and `run_dir` never come from a checkpoint, see `configuration`.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_lab.errors import ConfigError, printable
from diffusion_lab.processes import rank

WRITERS = ("callbacks", "logger", "trainer")  # groups whose classes write files
# Arguments of their constructors that name places to write to, or (settings) any option of another program.
PLACES = (
    *("cache", "cache_dir", "default_root_dir", "dir", "dirpath", "log_dir", "root_dir", "settings", "tracking_uri"),
    *("artifact_location", "offline_directory"),
)
ONLY_READ = ("weights_path",)


def without_places(composed: Mapping[str, Any], named: Collection[str]) -> dict[str, Any]:
    """Return a checkpoint's configuration without the places to write to that this command line does not name.

    The defaults of the constructors take their place, which is printed; loggers write to the run folder.

    Args:
        composed: plain containers, with interpolations.
        named: keys and groups of this command line.
    """

    dropped: list[str] = []

    def cleaned(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [cleaned(child, f"{key}.{i}") for i, child in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        kept = {k: v for k, v in value.items() if k not in PLACES or _is_named(f"{key}.{k}", named)}
        dropped.extend(f"+{key}.{k}={value[k]}" for k in value.keys() - kept.keys() if value[k])
        if key.startswith("logger.") and "save_dir" in kept and not _is_named(f"{key}.save_dir", named):
            kept["save_dir"] = "${run_dir}"
        return {k: cleaned(v, f"{key}.{k}") for k, v in kept.items()}

    result = {key: cleaned(value, key) if key in WRITERS else value for key, value in composed.items()}
    if dropped and rank() == 0:
        text = (
            f"not taken from the checkpoint, which may be anybody's: {' '.join(sorted(dropped))} (write it to use it)"
        )
        print(printable(text), file=sys.stderr, flush=True)
    return result


def refuse_places(settings: Mapping[str, Any], named: Collection[str]) -> None:
    """Raise ConfigError where a class that writes files has an argument outside the run folder that only the file names.

    Args:
        settings: resolved.
        named: keys and groups of this command line.
    """
    run_dir = Path(str(settings["run_dir"]))
    for group in WRITERS:
        for key, text in _texts(settings.get(group), group):
            path = Path(text)
            outside = path.is_absolute() or text.startswith("~") or ".." in path.parts or "://" in text
            if not outside or key.rsplit(".", 1)[-1] in ONLY_READ or _is_named(key, named):
                continue
            if path != run_dir and (run_dir not in path.parents or ".." in path.parts):
                raise ConfigError(
                    f"{key}={text} in the checkpoint is a place outside the run folder: write {key}= with the place that you want"
                )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text inside nested containers with its key."""
    if isinstance(value, str):
        yield key, value
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from _texts(child, f"{key}.{name}")


def _is_named(key: str, named: Collection[str]) -> bool:
    """Whether this command line writes a key, a node above it, or its group."""
    parts = key.split(".")
    return any(".".join(parts[: i + 1]) in named for i in range(len(parts)))


def with_defaults(composed: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's configuration with the root keys of this version, and the keys of its nodes without a class.

    Raises:
        ConfigError: a value where this version has a mapping.
    """
    complete = {**current, **composed}
    for key, value in current.items():
        if not isinstance(value, Mapping):
            continue
        if not isinstance(complete[key], Mapping):
            raise ConfigError(f"the checkpoint has {key} as a {type(complete[key]).__name__}: take another file")
        if key == "trainer" or "_target_" not in value:
            complete[key] = {**(value if key in ("trainer", "validation") else {}), **complete[key]}
    return complete


def require_resumable(content: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError for a checkpoint whose state of optimizer, loops and callbacks is not as Lightning writes it."""
    loops = content.get("loops")
    progress = loops.get("fit_loop") if isinstance(loops, Mapping) else None
    batches = progress.get("epoch_loop.batch_progress") if isinstance(progress, Mapping) else None
    counts = [batches.get(k) for k in ("current", "total")] if isinstance(batches, Mapping) else [None]
    whole = all(isinstance(c, Mapping) and all(isinstance(n, int) for n in c.values()) and "ready" in c for c in counts)
    optimizers, callbacks = content.get("optimizer_states"), content.get("callbacks")
    whole &= isinstance(optimizers, list) and all(map(_is_optimizer_state, optimizers))
    whole &= isinstance(callbacks, Mapping) and all(isinstance(state, Mapping) for state in callbacks.values())
    whole &= isinstance(content.get("lr_schedulers"), list) and isinstance(
        content.get("pytorch-lightning_version"), str
    )
    if not whole or not {"composed", "overrides"} <= content.keys():
        raise ConfigError(
            f"{path} has no state of the optimizer and the loops to resume from: write init={path} to use its weights"
        )


def check_loops(resume: Mapping[str, Any], fresh: Any, path: Path) -> None:
    """Raise ConfigError unless a checkpoint's counts of steps and batches have the keys of a new trainer's.

    Args:
        resume: the content of the checkpoint.
        fresh: the state of the fit loop of the trainer that resumes it.
        path: of the checkpoint.
    """
    if not _has_keys(resume["loops"]["fit_loop"], fresh):
        raise ConfigError(
            f"{path} has no counts of steps and batches to resume from: write init={path} to use its weights"
        )


def _has_keys(value: Any, fresh: Any) -> bool:
    if isinstance(fresh, Mapping):
        return isinstance(value, Mapping) and all(k in value and _has_keys(value[k], v) for k, v in fresh.items())
    return isinstance(value, int)


def _is_optimizer_state(state: Any) -> bool:
    if not isinstance(state, Mapping) or not isinstance(state.get("param_groups"), list):
        return False
    groups = all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in state["param_groups"])
    return (
        groups
        and isinstance(state.get("state"), Mapping)
        and all(isinstance(s, Mapping) for s in state["state"].values())
    )
