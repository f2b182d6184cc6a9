"""`python -m bench.gpu`: one command that checks and measures gistops on a machine with a GPU. See bench/README.md."""
