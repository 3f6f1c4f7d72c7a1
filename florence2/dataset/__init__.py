"""The rows of a finished run in the formats of other tools: COCO, YOLO, captions, WebDataset, Parquet, CSV.

An output folder of `florence2 run` or `florence2 label` goes in, a folder for each view comes out; no model is loaded.
Begin with `writing.write_views`.
"""
