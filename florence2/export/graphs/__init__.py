"""The graphs of a model: its parts traced, folded, merged, and their weights stored.

In goes a model, out come ONNX graphs in memory. Begin with `parts.py`, which traces the model's own modules.
"""
