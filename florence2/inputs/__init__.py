"""Turn images into pixel values, and tasks with their text into ids.

Everything here works on NumPy arrays and Python lists and never imports torch. Begin with `tasks`, then `image`.
"""
