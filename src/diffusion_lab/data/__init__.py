"""Images: where they come from (`sources`), how they are split and streamed, and the LightningDataModule over all of it.

Everything but `datamodule` is free of Lightning and Hydra.
"""
