"""`python -m bench.sharded`: time, memory and bytes of a head whose classes are divided between processes, and their model."""
