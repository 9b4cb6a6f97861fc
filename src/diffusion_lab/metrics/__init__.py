"""Quality of samples: distances between sets of features, on one process or several.

images → `extractors` → features → `collect` (sums over all images and processes) → `moments`, `frechet`, `scores`.
`options` has the classes of the group `metrics`; `measure` sorts them by extractor and names their figures; `images` wraps
torchmetrics' metrics. `reference` caches the statistics of a data set; `classifier` is the extractor of its own classes.
"""
