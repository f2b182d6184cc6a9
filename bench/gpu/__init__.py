"""`python -m bench.gpu`: one command for a machine with a GPU. bench/README.md says how to use it and read it."""
