"""Many images, one or more questions each: from paths on a command line to rows in a results file.

`sources` finds the images, `answering` asks the questions and yields `rows`, `journal` keeps the rows in an output
folder. Begin with `answering.Rows`.
"""
