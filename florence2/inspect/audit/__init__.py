"""Measure the tensors of a checkpoint, or compare two checkpoints tensor by tensor."""
