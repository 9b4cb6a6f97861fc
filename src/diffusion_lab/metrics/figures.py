"""Figures of quality as people read them: which way is good, and how many digits matter."""

import math

BETTER = {  # by the first part of a metric's name
    **dict.fromkeys(("fid", "fd", "kid", "nll"), "lower is better"),
    **dict.fromkeys(
        ("is", "precision", "recall", "density", "coverage", "confident", "label", "recognised", "as"),
        "higher is better",
    ),
}


def better(name: str) -> str:
    """Says "lower is better" or "higher is better" of fd_classifier_1k, recognised, …; "" of a name that is not known."""
    return BETTER.get(name.split("_")[0], "")


def number(value: float) -> str:
    """Four digits that matter."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits < 8 else f"{value:.3g}"
