"""Compare this project with its references, stage by stage: `python -m parity`. Not part of the installed package.

Synthetic checkpoints (`recipe`), cases and recorded outputs (`golden/`) go in, one table of comparisons comes out.
`__main__` lists what is compared; `compare` holds the comparison with a live reference, `records` that with records.
"""
