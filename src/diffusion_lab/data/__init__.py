"""Data sets (`sources`), splits, batches (`stream`), image files, and the LightningDataModule.

Only `datamodule` imports Lightning. No module imports Hydra.
"""
