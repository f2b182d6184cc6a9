"""Random cases of the public functions, drawn by Hypothesis and judged by the definition in float64.

`pytest tests/fuzz --cases 10000` runs 10,000 cases per test. Without `--cases`, each test runs the few that CI has time
for. `--seed` repeats a run.
"""
