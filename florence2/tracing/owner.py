"""The type of what can be traced: anything with a model and a processor, such as a `Florence2`."""

from typing import Protocol

from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor


class Traceable(Protocol):
    """The owner of the runs that a trace watches or a patch changes."""

    model: Florence2Model
    processor: Processor
