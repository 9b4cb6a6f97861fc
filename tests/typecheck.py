"""Runtime type checks of the tests: beartype checks every annotation, jaxtyping's shapes and dtypes among them.

conftest.py installs jaxtyping's import hook with these names before the package is imported. Outside the tests annotations are
not evaluated at run time, and beartype is not imported.
"""

from beartype import BeartypeConf, beartype

checked = beartype(
    conf=BeartypeConf(is_pep484_tower=True)
)  # int is accepted for float, as by static type checkers (PEP 484)

# The modules of the package that are checked.
CHECKED = (
    "clipping",
    "conditions",
    "denoiser",
    "editing",
    "gaussian",
    "guidance",
    "likelihood",
    "losses",
    "metrics",
    "models",
    "noise",
    "objectives",
    "samplers",
    "schedules",
    "time_samplers",
    "variances",
    "weightings",
)
