"""What each command does: one file, or folder, a command, with `run(config)` as its entry."""
