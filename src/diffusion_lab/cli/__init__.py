"""The entry point of every command: `main(name)`. Nothing heavy is imported before a command line has been checked."""

from diffusion_lab.cli.entry import main

__all__ = ["main"]
