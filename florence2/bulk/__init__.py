"""Many images, one or more questions each: from paths on a command line to rows in a results file.

Begin with `batch`; `sinks` says where the rows go.
"""
