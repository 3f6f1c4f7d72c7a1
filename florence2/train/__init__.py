"""Training, evaluation and LoRA: `pip install florence2[train]`. Nothing in the core imports this folder.

Files of questions and answers go in (`sources`, checked by `check`), a trained checkpoint or adapter comes out.
`trainer` is the place to begin; `data` makes the batches, and `evaluate` and `metrics` measure answers.
"""
