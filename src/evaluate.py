"""`python src/evaluate.py --help` says what it does."""

import sys

from diffusion_lab.runs.cli import main

if __name__ == "__main__":
    sys.exit(main("evaluate", task="evaluate:run"))
