"""Florence-2 from scratch: captions, boxes, outlines and text from images.

f = florence2.load("base")
print(f.run("<CAPTION>", "photo.jpg"))
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "TASKS",
    "Answer",
    "Box",
    "Cascade",
    "EncodedImage",
    "Florence2",
    "Florence2Config",
    "Florence2Error",
    "Florence2Model",
    "FreePrompt",
    "Generation",
    "GenerationOptions",
    "OnlyLabels",
    "Polygon",
    "Processor",
    "Quad",
    "Rule",
    "Stepper",
    "Task",
    "add_tasks",
    "bins_to_pixels",
    "explain_path",
    "extend_vocabulary",
    "generate",
    "load",
    "pixels_to_bins",
    "register_task",
    "resize_positions",
    "stepper",
]

if TYPE_CHECKING:
    from florence2.answers.answer import Answer, Box, Polygon, Quad
    from florence2.answers.cascade import Cascade
    from florence2.asking.requests import EncodedImage
    from florence2.errors import Florence2Error
    from florence2.fast.explain import explain_path
    from florence2.generation.generate import Stepper, generate, stepper
    from florence2.generation.labels import OnlyLabels
    from florence2.generation.options import GenerationOptions
    from florence2.generation.rules import Rule
    from florence2.generation.state import Generation
    from florence2.inputs.coordinates import bins_to_pixels, pixels_to_bins
    from florence2.inputs.tasks import TASKS, FreePrompt, Task, register_task
    from florence2.loading import load
    from florence2.model.config import Florence2Config
    from florence2.model.florence2 import Florence2Model
    from florence2.modify import add_tasks, extend_vocabulary, resize_positions
    from florence2.pipeline import Florence2
    from florence2.processor import Processor
else:
    from florence2.lazy import lazy_names

    # tasks, answers and errors can be used without torch
    __getattr__ = lazy_names(
        __name__,
        {
            "florence2.answers.answer": ("Answer", "Box", "Polygon", "Quad"),
            "florence2.answers.cascade": ("Cascade",),
            "florence2.errors": ("Florence2Error",),
            "florence2.generation.generate": ("Stepper", "generate", "stepper"),
            "florence2.generation.labels": ("OnlyLabels",),
            "florence2.fast.explain": ("explain_path",),
            "florence2.generation.options": ("GenerationOptions",),
            "florence2.generation.rules": ("Rule",),
            "florence2.generation.state": ("Generation",),
            "florence2.inputs.coordinates": ("bins_to_pixels", "pixels_to_bins"),
            "florence2.inputs.tasks": ("TASKS", "FreePrompt", "Task", "register_task"),
            "florence2.model.config": ("Florence2Config",),
            "florence2.model.florence2": ("Florence2Model",),
            "florence2.modify": ("add_tasks", "extend_vocabulary", "resize_positions"),
            "florence2.asking.requests": ("EncodedImage",),
            "florence2.loading": ("load",),
            "florence2.pipeline": ("Florence2",),
            "florence2.processor": ("Processor",),
        },
    )


def __dir__() -> list[str]:
    """List the public names as well, imported or not."""
    return sorted({*globals(), *__all__})
