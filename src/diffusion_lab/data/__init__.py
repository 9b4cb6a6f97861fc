"""Images: data sets (`sources`), splits, batches (`stream`), files that options name, and the LightningDataModule.

Only `datamodule` imports Lightning; nothing imports Hydra.
"""
