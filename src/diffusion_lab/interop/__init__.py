"""Weights and formats of other projects, in and out: one file a project."""
