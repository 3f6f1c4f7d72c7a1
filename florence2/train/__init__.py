"""Training: `pip install florence2[train]`. Nothing in the core imports this folder."""
