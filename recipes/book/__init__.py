"""The drawings, tables and listings of docs/how-it-works, all made from the model and the source.

`python -m recipes.book` makes them again; `tests/docs/test_book.py` fails when a page no longer fits the code.
"""
