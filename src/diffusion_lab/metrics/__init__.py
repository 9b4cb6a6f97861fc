"""How good are the samples: distances between sets of features, on one process or many.

images → `extractors` → features → `collect` (every image once, whoever shares the work) → `moments`, `frechet`, `scores`;
`reference` keeps what a data set's own images give; `classifier` is the project's own extractor.
"""
