"""The driver: trains GistNet, and a plain softmax model to hold it against. `python -m train --help`."""
