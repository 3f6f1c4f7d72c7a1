"""Training, evaluation and LoRA: the extra `train`. Nothing in the core imports this folder.

Files of questions and answers go in (`sources`, checked by `check`), a trained checkpoint or adapter comes out.
`trainer` is the place to begin; `data` makes the batches, and `evaluate` and `metrics` measure answers.
"""
