"""Instantiate nodes of the configuration, and convert errors of other packages' constructors to ConfigError.

A node is a mapping with `_target_` and the arguments of that class. `check` compares it with the constructor's signature and
annotations, `instantiate` builds it, and `instantiate_untrusted` builds a node that was read from a file. Nested nodes are
built first, so that an error names the node whose constructor raised it.
"""

import functools
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from diffusion_lab.errors import ConfigError, UntrustedNode
from diffusion_lab.instantiation.annotations import annotation, class_members, coerce
from diffusion_lab.instantiation.trust import CONF, PACKAGE, refuse_untrusted, targets, untrusted, untrusted_modules

__all__ = [
    "CONF",
    "PACKAGE",
    "accepted",
    "check",
    "check_named",
    "coerce",
    "foreign",
    "instantiate",
    "instantiate_untrusted",
    "is_node",
    "locate",
    "refuse_untrusted",
    "require_kind",
    "targets",
    "untrusted",
    "untrusted_modules",
]

RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
# Constructors that pass their **kwargs to another function. These arguments are checked against its signature.
RECEIVERS = {
    "pytorch_lightning.loggers.wandb.WandbLogger": "wandb.init",
    "diffusion_lab.models.unet.UNetForImageSize": "diffusion_lab.models.UNet",
    "pytorch_lightning.loggers.tensorboard.TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
}

Node = Mapping[str, Any]


def is_node(value: Any) -> bool:
    """Whether a value of the configuration is a node: a mapping with `_target_`."""
    return isinstance(value, Mapping) and "_target_" in value


def instantiate(node: Node, where: str = "", **passed: Any) -> Any:
    """Build the object that `node` describes.

    Args:
        node: the node, in plain containers with interpolations resolved.
        where: the key of the node, for error messages.
        passed: additional arguments of the constructor.

    Returns:
        The object, or with `_partial_: true` the constructor with its arguments bound.

    Raises:
        ConfigError: if `_target_` is missing or cannot be imported, an argument is unknown, or a required one is missing; or if
            a class outside this package raises ValueError, TypeError, LookupError or MisconfigurationException.
        TypeError: if the node was read from a file (use `instantiate_untrusted`). This is a defect of the caller.
    """
    if isinstance(node, UntrustedNode):
        raise TypeError(f"{where or node.get('_target_')} was read from a file: build it with instantiate_untrusted")
    return _build(node, where, passed)


def instantiate_untrusted(node: Node, trust: Collection[str], where: str = "", **passed: Any) -> Any:
    """Build the object that a node from a file describes, if its class is trusted.

    Trusted are the classes of this package, every `_target_` in the shipped conf/, torch's optimizers and schedulers, and the
    modules and classes in `trust`. The same holds for nested nodes.

    Args:
        node: the node, in plain containers.
        trust: names of modules, or full names of classes.
        where, passed: as for `instantiate`.

    Raises:
        ConfigError: if a class is not trusted or a value contains an interpolation, and as for `instantiate`.
    """
    refuse_untrusted(node, trust)
    return _build(node, where, passed)


def accepted(node: Node, **candidates: Any) -> dict[str, Any]:
    """Return the candidates that are parameters of the constructor of `node` and have no value in the node."""
    parameters = _parameters(locate(node))
    return {k: v for k, v in candidates.items() if k in parameters and node.get(k) is None}


def check(node: Node, where: str, passed: Collection[str] = (), kind: Any = None) -> None:
    """Compare a node and its nested nodes with the signatures and annotations of the constructors, without building them.

    Args:
        node: the node, in plain containers with interpolations resolved.
        where: the key of the node, for error messages.
        passed: names of arguments that the command passes later.
        kind: the class that a class in `_target_` is derived from; the result of a function is checked where it is built.

    Raises:
        ConfigError: if a value does not match the annotation of its parameter, `_target_` is missing or cannot be imported, an
            argument is unknown, or a required one is missing.
    """
    target, arguments = _bind(node, where, passed)
    if kind is not None and isinstance(target, type):
        require_kind(target, kind, where)
    for value in arguments.values():
        for child, path in value.nodes:
            check(child, path)


def require_kind(found: Any, kind: Any, where: str) -> None:
    """Raise ConfigError unless `found`, a class or an object, is of the class `kind`."""
    cls = found if isinstance(found, type) else type(found)
    if not issubclass(cls, kind):
        raise ConfigError(
            f"{where}: {cls.__module__}.{cls.__qualname__} is not a {kind.__name__}: write {where}._target_= of a class derived "
            f"from {kind.__module__}.{kind.__qualname__}"
        )


def check_named(nodes: Node, group: str, example: str, passed: Collection[str] = ()) -> None:
    """Check the nodes of a group of named nodes; null entries are skipped.

    Args:
        nodes: maps names to nodes.
        group: the key of the group, for error messages.
        example: an override that selects nodes of this group, for error messages.
        passed: as for `check`.

    Raises:
        ConfigError: if a node has no `_target_`, and as for `check`.
    """
    for name, node in nodes.items():
        if node is None:
            continue
        if not is_node(node):
            raise ConfigError(
                f"{group}.{name} has no _target_: write {example}, or +{group}.{name}._target_=my_package.MyClass"
            )
        check(node, f"{group}.{name}", passed)


def locate(node: Node, where: str = "") -> Any:
    """Import the class or function that a node names.

    Raises:
        ConfigError: if `_target_` is missing or cannot be imported.
    """
    name = node.get("_target_")
    if name is None or name == "???":
        key = where or "the node"
        raise ConfigError(f"{key} needs a class: write {key}._target_=my_package.MyClass")
    try:
        found = pkgutil.resolve_name(str(name))
    except (ImportError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where or 'the node'}._target_={name} cannot be imported ({reason}): write module.Class of an installed package, "
            "or of a module on PYTHONPATH or in the working folder"
        ) from error
    if not callable(found):
        raise ConfigError(f"{where or 'the node'}._target_={name} is a {type(found).__name__}: write module.Class")
    return found


# building -------------------------------------------------------------------------------------------------------------------


class _Argument(NamedTuple):
    """A value of a node, converted to the type of its parameter, and its nested nodes with their keys."""

    value: Any
    nodes: list[tuple[Node, str]]


def _bind(node: Node, where: str, passed: Collection[str]) -> tuple[Any, dict[str, _Argument]]:
    """Return the class or function of a node, and its arguments by name.

    Raises:
        ConfigError: as for `check`.
    """
    target = locate(node, where)
    parameters = _parameters(target)
    arguments: dict[str, _Argument] = {}
    for key, value in node.items():
        if key in RESERVED:
            continue
        if key not in parameters and "**" not in parameters:
            raise ConfigError(_unknown_argument(target, parameters, str(key), where))
        path = f"{where or node['_target_']}.{key}"
        nodes = list(_children(value, path))
        if is_node(value) and isinstance(child := locate(value, path), type):
            kinds = class_members(annotation(target, parameters[key])) if key in parameters else ()
            if kinds and not issubclass(child, kinds):
                require_kind(child, kinds[0], path)
        if key in parameters and not nodes:
            value = coerce(value, annotation(target, parameters[key]), path)
        arguments[str(key)] = _Argument(value, nodes)
    empty, bound = inspect.Parameter.empty, {*arguments, *passed}
    missing = [name for name, p in parameters.items() if p.default is empty and name not in ("**", *bound)]
    if missing and not node.get("_partial_") and not node.get("_args_"):
        name = getattr(target, "__name__", target)
        raise ConfigError(
            f"{where or name}: {name} needs {', '.join(missing)}: write +{where or name}.{missing[0]}=VALUE"
        )
    return target, arguments


def _build(node: Node, where: str, passed: Mapping[str, Any]) -> Any:
    target, arguments = _bind(node, where, passed)
    values = {k: _built(a.value, f"{where}.{k}") if a.nodes else a.value for k, a in arguments.items()}
    positional = [_built(value, where) for value in node.get("_args_", ())]
    call = functools.partial(target, *positional, **{**values, **passed})
    return call if node.get("_partial_") else foreign(call, where)


def _built(value: Any, where: str) -> Any:
    """Return a value in which every nested node is replaced by the object it describes."""
    if is_node(value):
        return _build(value, where, {})
    if isinstance(value, Mapping):
        return {key: _built(child, f"{where}.{key}") for key, child in value.items()}
    return [_built(child, where) for child in value] if isinstance(value, list | tuple) else value


def foreign(call: Callable[[], Any], where: str = "") -> Any:
    """Call a constructor, and convert the errors of other packages to ConfigError.

    Args:
        call: a class, or a `functools.partial` of one.
        where: the key of the node, for error messages.

    Raises:
        ConfigError: if a class outside this package raises ValueError, TypeError, LookupError, ImportError
            or MisconfigurationException.
    """
    target = call.func if isinstance(call, functools.partial) else call
    if str(getattr(target, "__module__", "")).split(".", 1)[0] == PACKAGE:
        return call()
    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:
        if (
            not isinstance(error, ValueError | TypeError | LookupError | ImportError)
            and type(error).__name__ != "MisconfigurationException"
        ):
            raise
        name = getattr(target, "__name__", str(target))
        if isinstance(error, ImportError):
            raise ConfigError(
                f"{where or name}: {name} needs a package that is not installed: {' '.join(str(error).split())}"
            ) from error
        raise ConfigError(f"{where or name}: {name} raised an error: {' '.join(str(error).split())}") from error


def _children(value: Any, where: str) -> Iterable[tuple[Node, str]]:
    """Yield the outermost nodes in a value, with their keys."""
    if is_node(value):
        yield value, where
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _children(child, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _children(child, where)


# signatures -----------------------------------------------------------------------------------------------------------------


def _parameters(target: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters by name, including those of the function in RECEIVERS. The key `**` stands for any name."""
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (ValueError, TypeError):  # a builtin without a signature
        return {"**": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
    rest = next((name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD), None)
    parameters = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if rest is None:
        return parameters
    for base in getattr(target, "__mro__", ()):
        receiver = RECEIVERS.get(f"{base.__module__}.{base.__qualname__}")
        if receiver is not None and importlib.util.find_spec(receiver.split(".", 1)[0]):
            inherited = {k: p for k, p in inspect.signature(base).parameters.items() if p.kind is not p.VAR_KEYWORD}
            return {**_parameters(pkgutil.resolve_name(receiver)), **inherited, **parameters}
    return {**parameters, "**": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _unknown_argument(target: Any, parameters: Mapping[str, Any], key: str, where: str) -> str:
    import difflib

    names = [name for name in parameters if name != "self"]
    near = difflib.get_close_matches(key, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    name = getattr(target, "__name__", target)
    return f"{where}.{key}: {name} has no argument {key}{hint}: remove it, or write one of {listed}"
