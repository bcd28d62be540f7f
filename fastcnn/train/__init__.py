"""Training: one step, the loop over epochs, checkpoints and the run folder."""
