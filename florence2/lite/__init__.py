"""A model without torch: what `florence2 export` writes goes in, answers come out.

    from florence2.lite import load

    f = load("folder")
    print(f.run("<OD>", "photo.jpg"))

`florence` has the methods of `florence2.Florence2` over onnxruntime, which `sessions` alone imports; `search` is the
search on NumPy arrays, `cache` the decoder that it drives, and `layout` names the files of an exported folder.
"""

from typing import TYPE_CHECKING

__all__ = ["Florence2Lite", "GenerationOptions", "OnlyLabels", "load"]

if TYPE_CHECKING:
    from florence2.generation.labels import OnlyLabels
    from florence2.generation.options import GenerationOptions
    from florence2.lite.florence import Florence2Lite
    from florence2.lite.loading import load
else:
    from florence2.lazy import lazy_names

    # the names of a folder's files can be read without the packages of the runtime
    __getattr__ = lazy_names(
        __name__,
        {
            "florence2.generation.labels": ("OnlyLabels",),
            "florence2.generation.options": ("GenerationOptions",),
            "florence2.lite.florence": ("Florence2Lite",),
            "florence2.lite.loading": ("load",),
        },
    )
