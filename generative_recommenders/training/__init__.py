"""Training: trainer, step, optimizers."""
