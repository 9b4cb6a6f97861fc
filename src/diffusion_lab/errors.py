"""Errors that a user can mend, and the type of nodes that a file supplies."""

from typing import Any


class ConfigError(ValueError):
    """A mistake of the user's. The message states what was found, what is allowed and what to write.

    The command line prints it as one line and exits with code 2. Every other exception is a defect and keeps its traceback.
    """


class UntrustedNode(dict[str, Any]):
    """A mapping read from a file. Only `instantiation.instantiate_untrusted` builds what its `_target_` names."""
