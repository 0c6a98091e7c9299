"""The training loop, its hyperparameters, checkpoints, and run directories."""
