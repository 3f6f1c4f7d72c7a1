"""Measure a checkpoint on the published benchmarks, from the datasets' own files.

A table's files and a journal of answers go in; metrics, next to the published ones, come out. `metrics` computes from
plain values, each as the benchmark's official code does; `tables` reads the datasets. Begin with `running.Running`.
"""
