"""Recipes that make the models in `weights/`; not part of the installed package."""
