"""Checks that refuse input which would be read wrongly without a sign.

In go an opened image or a prompt, out comes None or one sentence that says what it is. Begin with `tiff`.
"""
