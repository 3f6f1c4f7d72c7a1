"""From logits to ids: the rules that change scores, greedy and beam search, sampling, and the memory an answer takes.

Begin with `search`, which knows tensors and no model; `generate` joins it to a model.
"""
