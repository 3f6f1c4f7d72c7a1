"""An adapter's tensors in, a model's new weights out.

`plan` finds the place of every tensor in the file and lists those without one; `arithmetic` computes the new weights
one after another. `florence2.checkpoints.adapters` uses both.
"""
