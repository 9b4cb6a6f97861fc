"""How good are the samples: distances between sets of features, on one process or many.

images → `extractors` → features → `collect` (every image once, whoever shares the work) → `moments`, `frechet`, `scores`;
`options` holds the classes of the group `metrics`, `measure` sorts them by extractor and names their figures, `images` feeds
torchmetrics' metrics; `reference` keeps what a data set's own images give; `classifier` is the project's own extractor.
"""
