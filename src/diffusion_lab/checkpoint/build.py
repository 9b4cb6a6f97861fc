"""Build the objects that a file describes: of the kind that its place needs, no larger than the weights in the file."""

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.sources import Source
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import PACKAGE, instantiate_untrusted, is_node, locate, refuse_untrusted, targets

DEFAULT_ROOTS = ("data", "data/images")  # of conf/data
N = TypeVar("N", bound=nn.Module)


def build(node: Any, trust: Collection[str], where: str, kind: Any, **passed: Any) -> Any:
    """Build a node of a file as `instantiate_untrusted` does. Raises ConfigError: its class is of another kind as well."""
    check_kind(node, trust, where, kind)
    return instantiate_untrusted(node, trust, where, **passed)


def check_kind(node: Any, trust: Collection[str], where: str, kind: Any) -> None:
    """Raise ConfigError unless a node of a file names a trusted class derived from `kind`, or a function."""
    if not is_node(node):
        raise ConfigError(f"the file has no {where} with a _target_: take a file that src/train.py wrote")
    refuse_untrusted(node, trust)
    target = locate(node, where)
    if isinstance(target, type) and isinstance(kind, type) and not issubclass(target, kind):
        raise ConfigError(
            f"the file names {node['_target_']} as its {where}, which is not a {kind.__name__}: take another file"
        )


def network_of(node: Any, trust: Collection[str], state: Mapping[str, Tensor]) -> nn.Module:
    """Build the network of a file, on the CPU, with its weights.

    Raises:
        ConfigError: a class that is not trusted or no network, or weights that do not fit it.
    """
    check_kind(node, trust, "model", nn.Module)

    def construct() -> nn.Module:
        built: nn.Module = instantiate_untrusted(node, trust, "model")
        return built

    if all(target.startswith(f"{PACKAGE}.") for target in targets(node)):
        return fitting(construct, state)
    network = construct()  # of another package, whose constructor may need values
    network.load_state_dict(state)
    return network


def outlined(construct: Callable[[], N], most: int) -> N:
    """Construct a network on torch's meta device: with names and shapes, without numbers.

    Raises:
        RuntimeError: more than `most` parameters, at the first one too many.
    """
    count, thread = 0, threading.get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += parameter is not None and threading.get_ident() == thread  # the hook is one of all threads
        if count > most:
            raise RuntimeError(f"the network has more than {most:,} weights")

    hook = register_module_parameter_registration_hook(register)
    try:
        with torch.device("meta"):
            return construct()
    finally:
        hook.remove()


def fitting(construct: Callable[[], N], state: Mapping[str, Tensor]) -> N:
    """Construct a network and load its weights.

    It is constructed on torch's meta device first, which allocates nothing, and only as far as it has as many parameters as
    the file: widths and depths in a file are anybody's.

    Raises:
        RuntimeError: weights that do not fit.
    """
    outline = outlined(construct, len(state)).state_dict()
    different = [name for name in {**outline, **state} if _shape(outline, name) != _shape(state, name)]
    if different:
        name = different[0]
        shapes = f"{_shape(outline, name)} in the network, {_shape(state, name)} in the file"
        raise RuntimeError(f"{len(different)} weights differ, e.g. {name}: {shapes}")
    network = construct()
    network.load_state_dict(state)
    return network


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def overridden(stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return the node of a file's data with the keys of this command line, null ones left out, and the names of these keys."""
    chosen = {key: value for key, value in overrides.items() if value is not None}
    source = chosen.pop("source", {})
    node = {**stored, **chosen, "source": {**stored["source"], **source}}
    return node, {*chosen, *(f"source.{key}" for key in source)}


def data_module(node: Mapping[str, Any], trust: Collection[str], named: Collection[str], **passed: Any) -> DataModule:
    """Build the data module of a file, which writes to no folder that only the file names.

    Decoded images go to the user's cache folder, and missing files are not downloaded, unless the folder is a default one.

    Args:
        node: of a file, with the keys of this command line.
        trust: as for `instantiate_untrusted`.
        named: the keys that this command line wrote, without "data.": root, source.cache, download; "" for all.
        passed: further arguments.

    Raises:
        ConfigError: as `build`.
    """
    chosen = "" in named or "root" in named or node.get("root") in DEFAULT_ROOTS
    if not chosen and "download" not in named:
        node = {**node, "download": False}
    module: DataModule = build(node, trust, "data", DataModule, **passed)
    if not isinstance(module, DataModule) or not isinstance(module.source, Source):
        raise ConfigError("the file names no data set as its data: take another file")
    cache = getattr(module.source, "cache", None)
    if not ("" in named or "source.cache" in named or (chosen and cache is None)):
        module.source.only_read_folders()
    return module
