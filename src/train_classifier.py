"""`python src/train_classifier.py --help` says what it does."""

import sys

from diffusion_lab.runs.cli import main

if __name__ == "__main__":
    sys.exit(main("train_classifier", task="train_classifier:run"))
