"""`python src/report.py --help` prints its options."""

import sys

from diffusion_lab.cli import main

if __name__ == "__main__":
    sys.exit(main("report"))
