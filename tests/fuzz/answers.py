"""What must hold of every answer, and the same answer by a slower way."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from florence2 import Answer, Florence2, GenerationOptions
from florence2.answers.answer import parse_answer
from tests.fuzz.worker import expect
from tests.slow_search import beam_search, greedy


def check_answer(answer: Answer, f: Florence2) -> None:
    """Raise Wrong unless ids, scores, shapes and JSON of a generated answer are possible."""
    ids, vocabulary = answer.token_ids, f.model.config.text.vocab_size
    expect(ids and ids[0] == f.model.config.text.decoder_start_token_id, f"the answer begins with {ids[:1]}")
    expect(all(0 <= id < vocabulary for id in ids), f"ids outside 0..{vocabulary - 1}: {ids}")
    expect(len(answer.token_logprobs) == len(ids) - 1, "one log-probability for each id after the first")
    expect(all(value <= 1e-5 for value in answer.token_logprobs), f"log-probabilities {answer.token_logprobs}")
    expect(answer.finish_reason in ("stop", "length"), f"finish_reason {answer.finish_reason!r}")
    expect(answer.raw_text == f.processor.decode(ids), "raw_text is the text of the ids")
    check_shapes(answer)
    again = parse_answer(answer.task, answer.kind, answer.raw_text, answer.image_size)
    expect([box.xyxy for box in again.boxes] == [box.xyxy for box in answer.boxes], "the text gives other boxes")


def check_shapes(answer: Answer) -> None:
    """Raise Wrong unless coordinates and scores are finite numbers and the answer can be written and shown."""
    rows = [box.xyxy for box in answer.boxes] + [quad.xyxyxyxy for quad in answer.quads]
    rows += [ring for polygon in answer.polygons for ring in polygon.rings]
    expect(all(math.isfinite(value) for row in rows for value in row), f"coordinates are not finite: {rows}")
    shapes: list[Any] = [*answer.boxes, *answer.quads, *answer.polygons]
    scores = [shape.score for shape in shapes]
    expect(all(s is None or 0 <= s <= 1 + 1e-6 for s in [*scores, answer.score]), f"scores {scores} {answer.score}")
    expect(json.loads(answer.to_json()) == json.loads(json.dumps(answer.to_dict())), "to_json is to_dict")
    answer.to_florence()
    expect(isinstance(str(answer) + repr(answer), str), "the answer is shown")


def check_ids(
    f: Florence2, answer: Answer, pixels: torch.Tensor, prompt: Sequence[int], options: GenerationOptions
) -> None:
    """Raise Wrong unless a search that recomputes everything for each id finds the ids of the answer."""
    text = f.model.config.text
    fed = torch.tensor([list(prompt)])

    def table(ids: list[int]) -> list[float]:
        with torch.no_grad():
            logits: list[float] = f.model(pixels, fed, torch.tensor([ids]))[0, -1].tolist()
        return logits

    start, end = text.decoder_start_token_id, text.eos_token_id
    if options.num_beams == 1:
        found = greedy(table, options, start, end)
    else:
        found = beam_search(table, options, start, end)[0][1]
    expect(found == list(answer.token_ids), f"the ids are {answer.token_ids}, by the slow way {found}")
