"""The engine: requests are submitted at any time, and one step of the decoder advances all that run.

`generate` answers a batch and ends with its longest answer. Here an answer leaves when it ends, and the next one takes
its place. The tokens are those of `generate` for each request alone, whatever else runs.
"""

import hashlib
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from florence2.errors import Florence2Error, OptionError, PromptError, plain, shown
from florence2.generation import budget
from florence2.generation.engine.features import FeatureCache
from florence2.generation.engine.lane import Lane, OpensLanes, Outcome, OwnLane
from florence2.generation.engine.rereading import Rereading
from florence2.generation.generate import fit_options, not_finite, ordinary, special_ids
from florence2.generation.options import GenerationOptions
from florence2.generation.state import Generation
from florence2.model.florence2 import Florence2Model

_TOGETHER = 8  # questions whose prompts are encoded together; more gain nothing on a CPU


@dataclass(frozen=True, eq=False)
class Work:
    """One question about one image.

    Attributes:
        prompt: Ids of the prompt, with begin and end.
        pixel_values: (1, 3, H, W), normalised; None where `features` are given.
        features: (1, N, D) of an image that was encoded before.
        key: What the image is known by, equal for equal pixels; None is a hash of the pixels.
    """

    prompt: Sequence[int]
    options: GenerationOptions
    pixel_values: Tensor | None = None
    features: Tensor | None = None
    key: Hashable = None


@dataclass(eq=False)
class Ticket:
    """What stands for one submitted question."""

    work: Work
    bytes: int
    cancelled: bool = False


@dataclass(frozen=True, eq=False)
class Done:
    """A finished question, with its `generation` or the `error` that kept it from one."""

    ticket: Ticket
    generation: Generation | None = None
    error: Florence2Error | None = None


class Engine:
    """Answers many questions at once. One thread owns it; a question is refused before anything is computed."""

    def __init__(
        self,
        model: Florence2Model,
        slots: int = 8,
        *,
        cache_bytes: int = 512 << 20,
        memory_bytes: int | None = None,
        memory_share: float = budget.USABLE,
        decoding_share: float = 0.0,
        locations: Sequence[int] = (),
    ):
        """Make an engine without work.

        Args:
            model: What answers.
            slots: How many answers of one number of beams may run at once, at least 1.
            cache_bytes: How many bytes of encoded images are kept for later questions.
            memory_bytes: How many bytes all running answers may take; what does not fit waits. None takes
                `memory_share` of the free bytes, counted when an answer starts while no other runs.
            memory_share: That share, above 0 and up to 1; an answer alone may take 0.9.
            decoding_share: The least share of the time, 0 up to 1, that running answers get while others wait: 0 fills
                every slot at once, for the most answers in all; 0.5 lets a running answer take at most twice its time.
            locations: The ids of the location tokens, which a confidence needs; without them none is computed.

        Raises:
            OptionError: A value is out of range.
        """
        slots, memory_share, decoding_share = plain(slots), plain(memory_share), plain(decoding_share)
        if type(slots) is not int or slots < 1:
            raise OptionError(f"slots is {shown(slots)}; it must be a whole number of at least 1.")
        if not 0 < memory_share <= 1:
            raise OptionError(f"memory_share is {shown(memory_share)}; it must be above 0 and at most 1.")
        if not 0 <= decoding_share < 1:
            raise OptionError(f"decoding_share is {shown(decoding_share)}; it must be at least 0 and below 1.")
        self._model, self._slots, self._share = model, slots, decoding_share
        self._ids, self._locations = special_ids(model), locations
        self._features: FeatureCache[Tensor] = FeatureCache(cache_bytes)
        self._memory_bytes, self._memory_share, self._room = memory_bytes, memory_share, 0
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._unread: Rereading[Ticket] = Rereading(model, locations, soon=decoding_share > 0)
        # by the number of sequences an answer; the model's own by options
        self._lanes: dict[int | GenerationOptions, Lane[Ticket] | OwnLane[Ticket]] = {}
        self._cancelled = False  # whether any question was cancelled since the last step
        self._owed = 0.0  # seconds of decoding that running answers are due before the next one is encoded

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs, or is to be read again."""
        return bool(self._waiting or self._running or len(self._unread))

    @property
    def unfinished(self) -> int:
        """How many answers wait or run, without those that are only to be read again."""
        return len(self._waiting) + len(self._running)

    def submit(self, work: Work) -> Ticket:
        """Put a question into the queue.

        Raises:
            OptionError: A generation setting does not fit the model, or one answer could never fit into
                `memory_bytes`.
            PromptError: Image and prompt are longer than the model's positions, or the features are not of this model.
        """
        options = fit_options(self._model.config.text, work.options)
        length = self._image_tokens(work) + len(work.prompt)
        positions = self._model.config.text.max_position_embeddings
        if length > positions:
            raise PromptError(
                f"{length} positions (image tokens count too) are more than the {positions} of this checkpoint; "
                "shorten the text."
            )
        needed = budget.answer_bytes(self._model, options, length)
        if self._memory_bytes is not None and needed > self._memory_bytes:
            raise OptionError(
                f"One answer may take {needed / 1e9:.1f} GB, more than the {self._memory_bytes / 1e9:.1f} GB of this "
                "engine; lower max_new_tokens or num_beams."
            )
        ticket = Ticket(Work(work.prompt, options, work.pixel_values, work.features, work.key), needed)
        self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Let a question leave at the next step, without a `Done`; one that is finished stays so."""
        ticket.cancelled = self._cancelled = True

    def written(self, ticket: Ticket) -> list[int]:
        """Return the ids that a running answer of one sequence has so far; none of others, and in lanes of a model."""
        lane = self._lanes.get(ticket.work.options.width)
        return lane.written(ticket) if isinstance(lane, Lane) and ticket.work.options.width == 1 else []

    def charge(self, seconds: float) -> None:
        """Count seconds for which running answers waited; `decoding_share` says how much decoding they get for them."""
        self._owed += seconds * self._share / (1 - self._share)

    def fill_slots(self) -> None:
        """From now on, fill all slots before anything is decoded, for the most answers in all."""
        self._share = self._owed = 0.0
        self._unread.soon = False

    @property
    def owes_decoding(self) -> bool:
        """Whether running answers are due some decoding before more work is taken."""
        return self.busy and self._owed > 0

    def step(self) -> list[Done]:
        """Admit what fits, advance every running answer by one id, and return the questions that ended."""
        with torch.inference_mode():
            self._drop_cancelled()
            ended = self._admit() + self._decode()
        return [_done(ticket, outcome) for ticket, outcome in ended]

    def _decode(self) -> list[tuple[Ticket, Outcome]]:
        """Advance every lane by one step; return the answers that ended."""
        started = time.perf_counter()
        stopped = [each for lane in self._lanes.values() if len(lane) for each in lane.step()]
        for ticket, _ in stopped:
            self._running.remove(ticket)
        ended = self._unread.settle(stopped, len(self._running))
        self._owed = max(0.0, self._owed - (time.perf_counter() - started))
        if not self._running:
            self._owed = 0.0
        return ended

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        self._cancelled = False
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
        self._running = [ticket for ticket in self._running if not ticket.cancelled]
        self._unread.drop(lambda ticket: ticket.cancelled)
        for lane in self._lanes.values():
            lane.drop(lambda ticket: ticket.cancelled)

    def _admit(self) -> list[tuple[Ticket, Outcome]]:
        """Start waiting answers in their order while slots, memory and time allow; return those that failed."""
        failed: list[tuple[Ticket, Outcome]] = []
        while tickets := self._next_tickets():
            started = time.perf_counter()
            failed += self._start(tickets)
            self.charge(time.perf_counter() - started)
        for ticket, _ in failed:
            self._running.remove(ticket)
        return failed

    def _next_tickets(self) -> list[Ticket]:
        """Take the waiting questions that start next, together: one where answers get a share of the time meanwhile."""
        at_once = 1 if self._share else _TOGETHER
        taken: list[Ticket] = []
        while self._waiting and len(taken) < at_once and self._has_room(self._waiting[0]):
            taken.append(self._waiting.popleft())
            self._running.append(taken[-1])
        return taken

    def _has_room(self, ticket: Ticket) -> bool:
        if not self._running:
            free = budget.free_bytes(self._model.device) if self._memory_bytes is None else None
            self._room = self._memory_bytes or (1 << 62 if free is None else int(self._memory_share * free))
            return True  # `_start` refuses an answer that does not fit alone
        in_lane = sum(running.work.options.width == ticket.work.options.width for running in self._running)
        taken = sum(running.bytes for running in self._running)
        return self._owed <= 0 and in_lane < self._slots and taken + ticket.bytes <= self._room

    def _start(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Outcome]]:
        """Encode images and prompts, those that are alike together, and let the answers join their lanes."""
        failed: list[tuple[Ticket, Outcome]] = []
        alike: list[list[tuple[Ticket, Tensor]]] = []
        for ticket in tickets:
            try:
                if ticket.bytes > self._room:
                    budget.how_many_fit(ticket.bytes, self._model.device)  # raises: not even one
                features = self._encode_image(ticket.work)
            except Florence2Error as error:
                failed.append((ticket, error))
                continue
            padded = not isinstance(self._lane(ticket.work.options), Lane)
            part = next((part for part in alike if _can_join(part[0], (ticket, features), padded)), None)
            if part is None:
                alike.append(part := [])
            part.append((ticket, features))
        return failed + [each for part in alike for each in self._join(part)]

    def _join(self, asked: Sequence[tuple[Ticket, Tensor]]) -> list[tuple[Ticket, Outcome]]:
        """Encode the prompts of questions that are alike; their answers join a lane. Return those that failed."""
        tickets, options = [ticket for ticket, _ in asked], asked[0][0].work.options
        features = torch.cat([each for _, each in asked]).to(self._model.device, self._model.dtype)
        prompts, mask = _padded([ticket.work.prompt for ticket in tickets], self._ids.pad, features.device)
        try:
            if mask is None:
                memory = self._model.encode(features, prompts)
            else:
                memory, mask = self._model.encode(features, prompts, mask), self._model.memory_mask(features, mask)
        except Florence2Error as error:  # of a module of the user's
            return [(ticket, error) for ticket in tickets]
        finite = memory.isfinite().flatten(1).all(dim=1).tolist()
        failed = [ticket for ticket, good in zip(tickets, finite, strict=True) if not good]
        if failed:
            rows = torch.tensor(finite, device=memory.device)
            memory, mask = memory[rows], None if mask is None else mask[rows]
            tickets = [ticket for ticket, good in zip(tickets, finite, strict=True) if good]
        if tickets:
            self._lane(options).join(tickets, memory, options, mask)
            if options.confidence and self._locations:
                for row, ticket in enumerate(tickets):
                    length = features.shape[1] + len(ticket.work.prompt)
                    self._unread.expect(ticket, memory[row : row + 1, :length])  # without padding
        return [(ticket, not_finite(memory.dtype)) for ticket in failed]

    def _lane(self, options: GenerationOptions) -> "Lane[Ticket] | OwnLane[Ticket]":
        """Return the lane that answers with these options join, of the model's own kind where it has one now."""
        kept = self._lanes.get(options)
        if kept is not None and len(kept):  # it looks at the model itself
            return kept
        own = self._model.open_lane(options, self._ids) if isinstance(self._model, OpensLanes) else None
        if own is not None:
            self._lanes[options] = own
            return own
        if options.width not in self._lanes:
            self._lanes[options.width] = Lane(self._model, options.width, self._slots, self._ids)
        return self._lanes[options.width]

    def _encode_image(self, work: Work) -> Tensor:
        if work.features is not None:
            return work.features
        assert work.pixel_values is not None
        key = work.key if work.key is not None else _hash(work.pixel_values)
        features = self._features.get(key)
        if features is None:
            features = self._model.encode_image(work.pixel_values)
            self._features.put(key, features, features.nbytes)
        return features

    def _image_tokens(self, work: Work) -> int:
        if work.features is not None:
            if work.features.ndim != 3 or len(work.features) != 1:
                raise PromptError(
                    f"The features of an encoded image have the shape {tuple(work.features.shape)}; it must be "
                    "(1, tokens, values)."
                )
            if work.features.shape[2] != self._model.config.text.d_model:
                raise PromptError(
                    f"The encoded image has {work.features.shape[2]} values a token, but this model reads "
                    f"{self._model.config.text.d_model}: it comes from a different model; encode it again."
                )
            return work.features.shape[1]
        if work.pixel_values is None:
            raise PromptError("A question needs pixel_values or features; it has neither.")
        return self._model.config.vision.image_tokens(*work.pixel_values.shape[-2:])


def _can_join(asked: tuple[Ticket, Tensor], other: tuple[Ticket, Tensor], padded: bool) -> bool:
    """Return whether two questions can be encoded together, `padded` or not, and join a lane together."""
    (one, features), (two, others) = asked, other
    fit = padded or len(one.work.prompt) == len(two.work.prompt)
    return fit and features.shape == others.shape and one.work.options == two.work.options


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return prompts as (B, S) ids, and where these are real (B, S) bool; None where all are."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    same = min(map(len, prompts)) == longest
    return ids, None if same else torch.arange(longest, device=device) < lengths[:, None]


def _hash(pixel_values: Tensor) -> bytes:
    """Return a hash of shape and values (1, 3, H, W)."""
    hashed = hashlib.sha256(repr((pixel_values.dtype, tuple(pixel_values.shape))).encode())
    hashed.update(pixel_values.contiguous().cpu().view(torch.uint8).numpy().data)
    return hashed.digest()


def _done(ticket: Ticket, outcome: Outcome) -> Done:
    if isinstance(outcome, Florence2Error):
        return Done(ticket, error=outcome)
    return Done(ticket, ordinary(outcome))
