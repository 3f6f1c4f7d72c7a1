"""The outputs of a frozen vision tower, computed once for each image and kept on disk for every epoch and run.

In go images and a vision tower that does not train; out come grids (h, w, C). Begin with `filling.fill_store`, which a
run calls before its first update; `grids` is the format on disk.
"""
