"""`python -m bench.gpu_train`: train several seeds and methods concurrently on one GPU, within a time limit."""
