"""The parts of an explanation: tokens, their alternatives, the spread of a location, the regions of the answer."""

from dataclasses import dataclass

from florence2.answers.answer import Box, Polygon, Quad
from florence2.answers.confidence import Parts
from florence2.tracing.beams import Ban


@dataclass(frozen=True)
class Piece:
    """An id and its text; for a part of a character, its name in the vocabulary."""

    id: int
    text: str


@dataclass(frozen=True)
class Alternative(Piece):
    """An id that the model could have written, with its probability, 0..1."""

    probability: float


@dataclass(frozen=True)
class Spread:
    """The distribution over location bins at a place where the model wrote the location `chosen`.

    `probabilities` are those of all bins after the rules of the search; `mass` is their sum, which is below 1 when the
    model considered anything but a location. `mean` and `std`, in bins of a thousandth of the image's width or height,
    are of the bins alone; `distance` is the root mean square distance from `chosen`.
    """

    chosen: int
    probabilities: tuple[float, ...]
    mass: float
    mean: float
    std: float
    distance: float


@dataclass(frozen=True)
class ExplainedToken(Piece):
    """One token of the answer.

    `probability` is what the search counted, 1 for a forced id. `alternatives` are the most probable ids at this place
    after the rules, including the token itself, best first; `bans` are the ids that the rules made impossible. `lens`
    has the predictions of the embedding and then of each decoder layer (see `logit_lens`). `spread` is None except for
    locations.
    """

    probability: float
    alternatives: tuple[Alternative, ...]
    bans: tuple[Ban, ...]
    lens: tuple[tuple[Alternative, ...], ...]
    spread: Spread | None


@dataclass(frozen=True)
class ExplainedRegion:
    """A box, quad or polygon of the answer, with the tokens that it was read from and their probabilities.

    The score of the region is the geometric mean of the probabilities. `parts` are those of its raw confidence; None
    where it has no confidence.
    """

    shape: Box | Quad | Polygon
    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]
    parts: Parts | None = None
