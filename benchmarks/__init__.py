"""Speed, scaling and memory.

`python -m benchmarks speed` compares with the reference implementations, `scaling` shows how costs grow, `traces` what
a trace costs, `train` compares training, and `compare` sets two checkouts of this project against each other.
"""
