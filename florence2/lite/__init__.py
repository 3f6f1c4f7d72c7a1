"""A model without torch: the folder of an export goes in, answers come out."""
