"""The error of a wrong input, and the type of nodes read from a file."""

from typing import Any


class ConfigError(ValueError):
    """An input that the user can correct. The message states what was found, what is allowed and what to write.

    The command line prints it as one line and exits with code 2. Every other exception is a defect and keeps its traceback.
    """


class UntrustedNode(dict[str, Any]):
    """A mapping read from a file. Only `instantiation.instantiate_untrusted` builds what its `_target_` names."""
