"""Florence-2 from scratch: captions, boxes, outlines and text from images.

f = florence2.load("base")
print(f.run("<CAPTION>", "photo.jpg"))
"""

from typing import TYPE_CHECKING, Any

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
    "Generation",
    "GenerationOptions",
    "Polygon",
    "Processor",
    "Quad",
    "Task",
    "bins_to_pixels",
    "generate",
    "load",
    "pixels_to_bins",
    "register_task",
]

if TYPE_CHECKING:
    from florence2.answers.answer import Answer, Box, Polygon, Quad
    from florence2.answers.cascade import Cascade
    from florence2.errors import Florence2Error
    from florence2.generation.generate import generate
    from florence2.generation.options import GenerationOptions
    from florence2.generation.state import Generation
    from florence2.inputs.coordinates import bins_to_pixels, pixels_to_bins
    from florence2.inputs.tasks import TASKS, Task, register_task
    from florence2.model.config import Florence2Config
    from florence2.model.florence2 import Florence2Model
    from florence2.model.images import EncodedImage
    from florence2.pipeline import Florence2, load
    from florence2.processor import Processor
else:
    # Each name is imported on first use (PEP 562), so that tasks, answers and errors can be used without torch.
    _MODULES = {
        "answers.answer": ("Answer", "Box", "Polygon", "Quad"),
        "answers.cascade": ("Cascade",),
        "errors": ("Florence2Error",),
        "generation.generate": ("generate",),
        "generation.options": ("GenerationOptions",),
        "generation.state": ("Generation",),
        "inputs.coordinates": ("bins_to_pixels", "pixels_to_bins"),
        "inputs.tasks": ("TASKS", "Task", "register_task"),
        "model.config": ("Florence2Config",),
        "model.florence2": ("Florence2Model",),
        "model.images": ("EncodedImage",),
        "pipeline": ("Florence2", "load"),
        "processor": ("Processor",),
    }
    _HOMES = {name: f"florence2.{module}" for module, names in _MODULES.items() for name in names}

    def __getattr__(name: str) -> Any:
        """Import a public name from its module and keep it here."""
        if name not in _HOMES:
            raise AttributeError(f"module 'florence2' has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        """List the public names as well, imported or not."""
        return sorted({*globals(), *__all__})
