"""The commands: a file or folder each, entered by its function `run(config)`."""
