"""Florence-2 from scratch: captions, boxes, outlines and text from pictures.

f = florence2.load("base")
print(f.run("<CAPTION>", "photo.jpg"))
"""

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
from florence2.pipeline import EncodedImage, Florence2, load
from florence2.processor import Processor

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
