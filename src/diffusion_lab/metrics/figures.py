"""Format metrics, and state whether a lower or a higher value is better."""

import math

BETTER = {  # by the first part of a metric's name
    **dict.fromkeys(("fid", "fd", "kid", "nll"), "lower is better"),
    **dict.fromkeys(("is", "precision", "recall", "density", "coverage", "confident", "label"), "higher is better"),
}


def better(name: str) -> str:
    """Return "lower is better" or "higher is better" for a metric such as fd_classifier_1k; "" if the name is unknown."""
    return BETTER.get(name.split("_")[0], "")


def number(value: float) -> str:
    """Format a number to four significant digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits < 8 else f"{value:.3g}"
