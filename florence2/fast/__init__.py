"""Faster counterparts of parts of the model, with the same results, swapped in by `install`.

Each names the plain module that it stands in for and falls back to it whenever that module was changed.
"""
