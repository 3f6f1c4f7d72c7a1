"""A model as tools of an assistant, over the Model Context Protocol on stdin and stdout.

In come calls of three tools, each with the path of an image; out go answers. Begin with `tools.py`; `roots.py` says
which files may be read.
"""
