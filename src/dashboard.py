"""`python src/dashboard.py --help` says what it does."""

import sys

from diffusion_lab.runs.cli import main

if __name__ == "__main__":
    sys.exit(main("dashboard", task="dashboard:run"))
