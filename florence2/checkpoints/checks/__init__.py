"""The checks that make loading and saving strict.

`empty` builds the model that a file must fill; `reading` compares the file's tensors with it; `comparison` compares a
model with what its configuration describes, before it is saved; `belonging` compares a model with the tokenizer and the
image settings next to it. `functions` finds the user's function that shapes the model.
"""
