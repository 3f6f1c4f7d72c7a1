"""This project against its references, stage by stage: `python -m parity`. Not part of the installed package."""
