"""Import and export of weights in the formats of other projects, one file per project."""
