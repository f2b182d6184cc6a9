"""The driver, which trains GistNet and a plain softmax classifier for comparison. See `python -m train --help`."""
