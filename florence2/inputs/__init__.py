"""From what a user has to what the model reads: an image becomes pixel values, a task and its text become ids.

Everything here works on NumPy arrays and Python lists and never imports torch. Begin with `tasks`, then `image`.
"""
