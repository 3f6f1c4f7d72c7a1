"""From logits to ids: rules that change scores, greedy and beam search, sampling, and the bytes that an answer takes.

Begin with `search`, which knows tensors and no model; `generate` joins it to a model.
"""
