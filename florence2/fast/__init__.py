"""The same numbers sooner: faster counterparts of parts of the model, swapped in by `install`.

Each names the plain module that it stands in for and falls back to it whenever that module was changed.
"""
