"""Label any number of images, resumably: sources, decoding in processes, a journal of rows.

In go files, folders, lists, tars and tables; out comes one row for each question about each image. Begin with
`sources.opening`, which finds the images.
"""
