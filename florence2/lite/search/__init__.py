"""The search on arrays: logits go in, ids come out, and no model is known.

Begin with `search.py`; `rules.py` changes the scores of the next id, `arrays.py` has what both need of NumPy.
"""
