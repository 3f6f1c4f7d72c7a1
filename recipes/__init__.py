"""How the models in `weights/` are made; not part of the installed package."""
