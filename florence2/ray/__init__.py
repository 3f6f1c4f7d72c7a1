"""Label images on many machines with Ray Data.

In goes a dataset with the bytes of images; out come the columns of `florence2 dataset --to parquet`, errors among
them. Begin with `labeler.Labeler`; `docs/ray_label.py` runs it.
"""

from florence2.ray.labeler import Labeler

__all__ = ["Labeler"]
