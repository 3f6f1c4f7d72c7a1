"""Label any number of images, resumably: sources, decoding in processes, a journal of rows.

In go files, folders, lists, tars and tables; out comes one row for each question about each image. `sources` finds the
images, `remaining` the questions left, `ahead` and `decoding` let processes read the images, `journal` keeps the
rows. Begin with `labelling`, where they meet.
"""
