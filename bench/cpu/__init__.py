"""Time and memory on the CPU, as ratios to a plain linear classifier: `pytest bench/` prints the tables."""
