"""HTML that cannot be broken by what it shows: every text is escaped, unless it is HTML made here."""

from html import escape
from typing import Any

_VOID = {"meta", "link", "img", "input", "br"}


class Html(str):
    """Text that is HTML already."""


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element. `class_` is class, `aria_label` is aria-label; True is a bare attribute; None and False are left out."""
    said = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_safe(value)}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID:
        return Html(f"<{tag}{said}>")
    return Html(f"<{tag}{said}>{join(children)}</{tag}>")


def join(children: Any) -> Html:
    """Children one after the other; lists are opened, None is left out."""
    if children is None:
        return Html("")
    if isinstance(children, list | tuple):
        return Html("".join(join(child) for child in children))
    return children if isinstance(children, Html) else Html(_safe(children))


def _safe(value: Any) -> str:
    """Escaped; a file name that is no UTF-8 loses what is none."""
    return escape(str(value).encode("utf-8", "replace").decode(), quote=True)
