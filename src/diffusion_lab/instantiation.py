"""From a node of the configuration to the object that it describes: the one border to classes of others.

A node is a mapping with `_target_` and that class's arguments. `check` compares it with the constructor's signature and
annotations; `instantiate` builds it; `instantiate_untrusted` builds a node that a file supplied. Hydra locates the class. Nested
nodes are built first, so that it is known whose constructor refuses.
"""

import functools
import importlib.util
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_lab.errors import ConfigError, UntrustedNode

PACKAGE = "diffusion_lab"
CONF = Path(__file__).resolve().parents[2] / "conf"
RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
# Constructors that hand their **kwargs on, and to whom: what that function does not take, nobody reads.
RECEIVERS = {
    "pytorch_lightning.loggers.wandb.WandbLogger": "wandb.init",
    "diffusion_lab.models.unet.UNetForImageSize": "diffusion_lab.models.UNet",
    "pytorch_lightning.loggers.tensorboard.TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
}

Node = Mapping[str, Any]


def is_node(value: Any) -> bool:
    """Whether a value of the configuration describes an object."""
    return isinstance(value, Mapping) and "_target_" in value


def instantiate(node: Node, where: str = "", **given: Any) -> Any:
    """Build what `node` describes.

    Args:
        node: plain containers, interpolations resolved.
        where: the node's key, for messages.
        given: further arguments, objects that the command passes.

    Returns:
        The object; with `_partial_: true` the constructor with these arguments bound.

    Raises:
        ConfigError: no `_target_`, or one that cannot be imported; an argument that the constructor does not have, or a required
            one that is missing; ValueError, TypeError or MisconfigurationException of a class outside this package.
        TypeError: a node that was read from a file (a defect: see `instantiate_untrusted`).
    """
    if isinstance(node, UntrustedNode):
        raise TypeError(f"{where or node.get('_target_')} was read from a file: build it by instantiate_untrusted")
    return _build(node, where, given)


def instantiate_untrusted(node: Node, trust: Collection[str], where: str = "", **given: Any) -> Any:
    """Build a node that a file supplied: a class of this package, a `_target_` of the shipped conf/, an optimizer or scheduler
    of torch, or what `trust` names; nested nodes likewise.

    Args:
        node: plain containers.
        trust: modules, or classes by their full name.
        where, given: as for `instantiate`.

    Raises:
        ConfigError: another class, an interpolation, and as `instantiate`.
    """
    refuse_untrusted(node, trust)
    return _build(node, where, given)


def accepted(node: Node, **candidates: Any) -> dict[str, Any]:
    """Those of the candidates for which the constructor of `node` has a parameter and the node no value."""
    parameters = _parameters(locate(node))
    return {k: v for k, v in candidates.items() if k in parameters and node.get(k) is None}


def check(node: Node, where: str, given: Collection[str] = ()) -> None:
    """Refuse what the constructor of a node, or of a node inside it, would not take. Nothing is built.

    Args:
        node: plain containers, interpolations resolved.
        where: the node's key, for messages.
        given: names of arguments that the command passes later.

    Raises:
        ConfigError: as `instantiate`, and a value that the parameter's annotation excludes.
    """
    target = locate(node, where)
    parameters = _parameters(target)
    for key, value in _arguments(node).items():
        _refuse_strangers(target, parameters, key, where)
        for child, path in _children(value, f"{where}.{key}"):
            check(child, path)
        if key in parameters and not _holds_node(value):
            coerce(value, annotation(target, parameters[key]), f"{where}.{key}")
    if not node.get("_partial_"):
        _refuse_missing(target, parameters, {*_arguments(node), *given}, where)


def check_named(nodes: Node, group: str, example: str, given: Collection[str] = ()) -> None:
    """`check` for every node of a dictionary of named ones; null switches one off.

    Args:
        nodes: name → node.
        group: the dictionary's key, for messages.
        example: how nodes of this group are chosen, for messages.
        given: as for `check`.

    Raises:
        ConfigError: a mapping without `_target_`, and as `check`.
    """
    for name, node in nodes.items():
        if node is None:
            continue
        if not is_node(node):
            raise ConfigError(
                f"{group}.{name} has no _target_, so that nothing reads it: write {example}, or "
                f"+{group}.{name}._target_=my_package.MyClass"
            )
        check(node, f"{group}.{name}", given)


def locate(node: Node, where: str = "") -> Any:
    """The class or function that a node names. ConfigError: none, or it cannot be imported."""
    name = node.get("_target_")
    if name is None or name == "???":
        key = where or "the node"
        raise ConfigError(f"{key} needs the class that it stands for: write {key}._target_=my_package.MyClass")
    try:
        return pkgutil.resolve_name(str(name))
    except (ImportError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where or 'the node'}._target_={name} cannot be imported ({reason}): write module.Class of an installed package, "
            "or of a module on PYTHONPATH or in the working folder"
        ) from error


# files ----------------------------------------------------------------------------------------------------------------------


def untrusted(value: Any) -> Any:
    """The same containers with every mapping as an `UntrustedNode`."""
    if isinstance(value, Mapping):
        return UntrustedNode({key: untrusted(child) for key, child in value.items()})
    return [untrusted(child) for child in value] if isinstance(value, list | tuple) else value


def refuse_untrusted(value: Any, trust: Collection[str]) -> None:
    """Raise ConfigError where containers from a file name a class that is not trusted.

    Nothing in a resolved configuration is an interpolation; one that is there all the same would be evaluated later.
    """
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"the checkpoint's configuration holds an interpolation ({value[:60]!r}): it was not written by src/train.py"
        )
    if isinstance(value, Mapping):
        target = value.get("_target_")
        if target is not None and not _is_trusted(str(target), trust):
            module = str(target).rsplit(".", 1)[0]
            raise ConfigError(
                f"the checkpoint names {target}, no class of this package: if you trust it write trust=[{module}]"
            )
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for child in value:
            refuse_untrusted(child, trust)


def targets(value: Any) -> set[str]:
    """Every `_target_` in plain containers."""
    if isinstance(value, Mapping):
        own = {str(value["_target_"])} if value.get("_target_") else set()
        return own.union(*(targets(child) for child in value.values()))
    return set().union(*(targets(child) for child in value)) if isinstance(value, list | tuple) else set()


def untrusted_modules(value: Any) -> list[str]:
    """The modules that `trust` must name before these containers, read from a file, are built."""
    return sorted({target.rsplit(".", 1)[0] for target in targets(value) if not _is_trusted(target, ())})


@functools.cache
def shipped_targets() -> frozenset[str]:
    """Every `_target_` that a file of this project's conf/ names."""
    lines = (line for file in CONF.rglob("*.yaml") for line in file.read_text().splitlines())
    found = (re.match(r"\s*(?:- )?_target_: *([\w.]+)", line) for line in lines)
    return frozenset(match.group(1) for match in found if match)


def _is_trusted(target: str, trust: Collection[str]) -> bool:
    if target in shipped_targets() or any(target == name or target.startswith(name + ".") for name in trust):
        return True
    if not target.startswith((PACKAGE + ".", "torch.optim.")):
        return False
    try:
        named = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return False
    if not isinstance(named, type):
        return False
    if named.__module__.startswith(PACKAGE + "."):
        return True
    import torch

    kinds = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    return named.__module__.startswith("torch.optim") and issubclass(named, kinds)


# building -------------------------------------------------------------------------------------------------------------------


def _build(node: Node, where: str, given: Mapping[str, Any]) -> Any:
    target = locate(node, where)
    parameters = _parameters(target)
    arguments: dict[str, Any] = {}
    for key, value in _arguments(node).items():
        _refuse_strangers(target, parameters, key, where)
        if key in parameters and not _holds_node(value):
            value = coerce(value, annotation(target, parameters[key]), f"{where or node['_target_']}.{key}")
        arguments[key] = _built(value, f"{where}.{key}")
    positional = [_built(value, where) for value in node.get("_args_", ())]
    arguments |= given
    call = functools.partial(target, *positional, **arguments)
    if node.get("_partial_"):
        return call
    if not positional:
        _refuse_missing(target, parameters, arguments, where)
    return foreign(call, where)


def _built(value: Any, where: str) -> Any:
    if is_node(value):
        return _build(value, where, {})
    if isinstance(value, Mapping):
        return {key: _built(child, f"{where}.{key}") for key, child in value.items()}
    return [_built(child, where) for child in value] if isinstance(value, list | tuple) else value


def foreign(call: Callable[[], Any], where: str = "") -> Any:
    """The result of a constructor, `functools.partial` of it. ConfigError: what one outside this package refuses."""
    target = call.func if isinstance(call, functools.partial) else call
    if str(getattr(target, "__module__", "")).split(".", 1)[0] == PACKAGE:
        return call()
    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:
        if (
            not isinstance(error, ValueError | TypeError | ImportError)
            and type(error).__name__ != "MisconfigurationException"
        ):
            raise
        name = getattr(target, "__name__", str(target))
        if isinstance(error, ImportError):
            raise ConfigError(
                f"{where or name}: {name} needs a package that is not installed: {' '.join(str(error).split())}"
            ) from error
        raise ConfigError(f"{where or name}: {name} refuses these arguments: {' '.join(str(error).split())}") from error


def _arguments(node: Node) -> dict[str, Any]:
    return {str(key): value for key, value in node.items() if key not in RESERVED}


def _children(value: Any, where: str) -> Iterable[tuple[Node, str]]:
    """The nodes inside a value, not those inside them."""
    if is_node(value):
        yield value, where
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _children(child, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _children(child, where)


def _holds_node(value: Any) -> bool:
    return any(True for _ in _children(value, ""))


# signatures -----------------------------------------------------------------------------------------------------------------


def _parameters(target: Any) -> dict[str, inspect.Parameter]:
    """Parameters by name, those of the receiving function in place of **kwargs; a `**` left over means that any name is taken."""
    try:
        found = dict(inspect.signature(target).parameters)
    except (ValueError, TypeError):  # a builtin without a signature
        return {"**": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
    rest = next((name for name, p in found.items() if p.kind is p.VAR_KEYWORD), None)
    found = {name: p for name, p in found.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if rest is None:
        return found
    for base in getattr(target, "__mro__", ()):
        receiver = RECEIVERS.get(f"{base.__module__}.{base.__qualname__}")
        if receiver is not None and importlib.util.find_spec(receiver.split(".", 1)[0]):
            own = {k: p for k, p in inspect.signature(base).parameters.items() if p.kind is not p.VAR_KEYWORD}
            return {**_parameters(pkgutil.resolve_name(receiver)), **own, **found}
    return {**found, "**": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _refuse_strangers(target: Any, parameters: Mapping[str, Any], key: str, where: str) -> None:
    if key in parameters or "**" in parameters:
        return
    import difflib

    names = [name for name in parameters if name != "self"]
    near = difflib.get_close_matches(key, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    some = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    raise ConfigError(
        f"{where}.{key}: {getattr(target, '__name__', target)} has no argument {key}{hint}: leave it out, or write one of {some}"
    )


def _refuse_missing(target: Any, parameters: Mapping[str, Any], named: Collection[str], where: str) -> None:
    empty = inspect.Parameter.empty
    missing = [k for k, p in parameters.items() if k != "**" and p.default is empty and k not in named]
    if missing:
        name = getattr(target, "__name__", target)
        raise ConfigError(
            f"{where or name}: {name} needs {', '.join(missing)}: write +{where or name}.{missing[0]}=VALUE"
        )


def annotation(target: Any, parameter: inspect.Parameter) -> Any:
    """The type that a parameter is annotated with; `Any` where there is none, or none that can be evaluated."""
    stated = parameter.annotation
    if stated is inspect.Parameter.empty:
        return Any
    if not isinstance(stated, str):
        return stated
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    names = getattr(inspect.unwrap(function), "__globals__", {})
    holder = types.SimpleNamespace(__annotations__={"value": stated})
    try:
        return typing.get_type_hints(holder, globalns=names)["value"]
    except Exception:  # names that exist for the type checker alone
        return Any


WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def coerce(value: Any, expected: Any, where: str) -> Any:
    """`value`, where the annotation allows it; a number where text alone is expected becomes text (a run named 2026).

    Raises:
        ConfigError: the annotation excludes it.
    """
    if _fits(value, expected):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and _fits("", expected):
        return str(value)
    if value == "???":
        raise ConfigError(f"{where} has no value yet: write {where}=VALUE")
    raise ConfigError(f"{where}={_shown(value)} has the wrong type: {' or '.join(_words(expected))} is needed")


def _shown(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )


def _members(expected: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return tuple(m for member in typing.get_args(expected) for m in _members(member))
    return (expected,)


def _fits(value: Any, expected: Any) -> bool:
    """Whether a plain value can be an argument of that type. Types that no plain value expresses accept everything."""
    return any(_fits_one(value, member) for member in _members(expected))


def _fits_one(value: Any, expected: Any) -> bool:
    origin, arguments = typing.get_origin(expected) or expected, typing.get_args(expected)
    if origin is typing.Annotated:
        return _fits(value, arguments[0])
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if expected is None or origin is type(None):
        return value is None
    if origin in (bool, str):
        return isinstance(value, origin)
    if origin in (int, float):
        kinds = (int,) if origin is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if origin in (list, tuple, set, Sequence, Iterable, Collection):
        inner = [a for a in arguments if a is not Ellipsis]
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and len(inner) == len(value) and Ellipsis not in arguments:
            return all(_fits(v, a) for v, a in zip(value, inner, strict=True))
        return len(inner) != 1 or all(_fits(v, inner[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if isinstance(origin, type) and origin.__module__.split(".", 1)[0] == PACKAGE:
        return isinstance(
            value, origin
        )  # described by a node, which was built before, never by a number, text or a mapping
    return True


def _words(expected: Any) -> list[str]:
    words: list[str] = []
    for member in _members(expected):
        origin = typing.get_origin(member) or member
        if origin is typing.Literal:
            words += [str(choice) for choice in typing.get_args(member)]
        elif origin in (tuple, set, Sequence, Iterable, Collection):
            words.append(WORDS[list])
        elif origin in WORDS or member is None:
            words.append(WORDS[type(None) if member is None else origin])
        else:
            words.append(f"a node with _target_ ({getattr(origin, '__name__', origin)})")
    words = list(dict.fromkeys(words))
    return [w for w in words if not (w == WORDS[int] and WORDS[float] in words)]
