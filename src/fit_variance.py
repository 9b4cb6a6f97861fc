"""`python src/fit_variance.py --help` prints its options."""

from diffusion_lab.cli import start

if __name__ == "__main__":
    start("fit_variance")
