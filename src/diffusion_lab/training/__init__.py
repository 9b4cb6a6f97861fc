"""The LightningModule, its callbacks, loggers and optimizers."""
