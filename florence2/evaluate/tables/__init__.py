"""Read the benchmarks' own files, as their owners distribute them, into examples.

A folder of files goes in; examples come out: an image, the text that is asked about it, and the truth. `catalogue`
names the tables and their files; each other module reads one family. Files are not trusted: whatever does not have
the expected form is refused with one sentence. Begin with `catalogue.read_table`.
"""
