"""From the arguments of a command line to images, one after another, however many there are.

In go files, folders, patterns, lists, JSON Lines, tars and Parquet tables; out come `item.Item`s, lazily and in a
stable order. Begin with `opening.open_sources`.
"""
