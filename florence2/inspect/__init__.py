"""Looking inside: `pip install florence2[inspect]`. Nothing in the core imports this folder."""
