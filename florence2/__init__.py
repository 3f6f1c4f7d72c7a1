"""Florence-2 from scratch: captions, boxes, outlines and text from pictures.

f = florence2.load("base")
print(f.run("<CAPTION>", "photo.jpg"))
"""

from florence2.answers import Answer, Box, Polygon, Quad
from florence2.cascade import Cascade
from florence2.config import Florence2Config
from florence2.coordinates import dequantize, quantize
from florence2.decoding import Generation
from florence2.errors import Florence2Error
from florence2.generation import generate
from florence2.model import Florence2Model
from florence2.options import GenerationOptions
from florence2.pipeline import EncodedImage, Florence2, load
from florence2.processor import Processor
from florence2.tasks import TASKS, Task, register_task

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
    "dequantize",
    "generate",
    "load",
    "quantize",
    "register_task",
]
