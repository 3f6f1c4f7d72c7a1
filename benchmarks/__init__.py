"""Speed, scaling and memory against the reference implementations: `python -m benchmarks`."""
