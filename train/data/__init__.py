"""Training data: sets from files of arrays, and the random stream of batches."""
