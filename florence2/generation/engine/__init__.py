"""The engine: many answers at once, each joining and leaving when it may."""
