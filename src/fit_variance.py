"""`python src/fit_variance.py --help` says what it does."""

import sys

from diffusion_lab.runs.cli import main

if __name__ == "__main__":
    sys.exit(main("fit_variance", task="fit_variance:run"))
