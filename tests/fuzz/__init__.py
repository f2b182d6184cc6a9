"""Random cases of the public functions, drawn by Hypothesis and judged by the definition in float64.

`pytest tests/fuzz --cases 10000` runs 10,000 new cases per test, and `--seed` repeats them. Without `--cases`, each test
runs the same 40, for which CI has time.
"""
