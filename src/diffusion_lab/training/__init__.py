"""Training: the LightningModule, its callbacks, optimisers."""
