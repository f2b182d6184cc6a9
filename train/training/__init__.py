"""Training: the loop over methods, the trainer, and the files of a run."""
