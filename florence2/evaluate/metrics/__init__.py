"""The metrics of the benchmarks: words of captions, CIDEr-D, VQA accuracy, boxes, masks.

Plain values go in, numbers come out; nothing here knows a model, a dataset's files, or a process of another language.
"""
