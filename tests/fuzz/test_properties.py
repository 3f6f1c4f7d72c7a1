"""Properties that hold of any value, for which hypothesis looks for the smallest counterexample."""

import json
import math
import tempfile
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from florence2.answers.answer import parse_answer
from florence2.checkpoints.config_files import parse_config, parse_image_config
from florence2.errors import ConfigError, ImageError, OptionError, PromptError
from florence2.generation.options import GenerationOptions
from florence2.inputs.coordinates import bins_to_pixels, box_to_tokens, pixels_to_bins
from florence2.inputs.image import open_image
from florence2.inputs.tasks import TASKS, AnswerKind, check_prompt
from florence2.inputs.tokenizer import FlorenceTokenizer
from tests.fuzz.answers import check_shapes
from tests.fuzz.material import NANO

set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis-"))  # nothing is kept from run to run
PROPERTIES = settings(
    derandomize=True, database=None, deadline=None, max_examples=100, suppress_health_check=list(HealthCheck)
)
SIZES = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))
NUMBERS = st.one_of(st.integers(), st.floats(), st.just(10**400))
JSON: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
PIECES = st.one_of(
    st.sampled_from(
        ("<poly>", "</poly>", "<sep>", "<and>", "<s>", "</s>", "<pad>", "<", ">", "\n", "cat", "the image")
    ),
    st.integers(0, 999).map("<loc_{}>".format),
    st.lists(st.integers(0, 999), min_size=4, max_size=9).map(lambda bins: "".join(f"<loc_{bin}>" for bin in bins)),
    st.integers(0).map("<loc_{}>".format),
    st.text(max_size=5),
)


@PROPERTIES
@given(st.sampled_from(get_args(AnswerKind)), st.lists(PIECES, max_size=20).map("".join), SIZES)
@example("boxes", "cat" + ("<loc_" + "9" * 5000 + ">") * 4, (640, 480))
def test_every_text_is_read(kind: AnswerKind, text: str, size: tuple[int, int]) -> None:
    answer = parse_answer("<OD>", kind, text, size)
    check_shapes(answer)
    assert len(text) >= len(answer.text)


@PROPERTIES
@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), min_size=1, max_size=8), SIZES)
def test_bins_come_back_from_their_pixels(points: list[tuple[int, int]], size: tuple[int, int]) -> None:
    row = [bin for point in points for bin in point]
    pixels = bins_to_pixels(row, size)
    assert all(0 <= value <= size[i % 2] for i, value in enumerate(pixels))
    assert pixels_to_bins(pixels, size) == row


@PROPERTIES
@given(st.one_of(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), st.binary(max_size=5), JSON), SIZES)
@example((0, 0, 10**400, 10**400), (640, 480))
@example(b"\1\2\3\4", (640, 480))
def test_a_box_becomes_a_region_or_is_refused(box: Any, size: tuple[int, int]) -> None:
    try:
        tokens = box_to_tokens(box, size)
    except PromptError:
        return
    assert len(box) == 4
    assert all(math.isfinite(float(value)) for value in box)
    assert not isinstance(box, str | bytes)
    assert check_prompt("<REGION_TO_OCR>", tokens) == (TASKS["<REGION_TO_OCR>"], tokens)


@PROPERTIES
@given(
    st.dictionaries(
        st.sampled_from(sorted(GenerationOptions().to_dict())), st.one_of(JSON, st.integers(0, 5)), max_size=3
    )
)
def test_settings_are_kept_or_refused(changes: dict[str, Any]) -> None:
    try:
        options = GenerationOptions().changed(**changes)
    except OptionError:
        return
    kept = {name: getattr(options, name) for name in changes}
    assert kept == changes
    assert json.loads(json.dumps(options.to_dict()))


@pytest.fixture(scope="module")
def tokenizer() -> FlorenceTokenizer:
    return FlorenceTokenizer(NANO / "tokenizer.json")


@PROPERTIES
@given(st.lists(PIECES, max_size=8).map("".join))
def test_a_text_comes_back_from_its_ids(tokenizer: FlorenceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-1]) == (0, 2)
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.decode(ids[1:-1]) == text


def _changed(name: str) -> Any:
    """Strategy: a configuration file with one entry of any section replaced."""
    values = json.loads((NANO / name).read_text(encoding="utf-8"))
    paths = [(key,) for key in values]
    paths += [(key, inner) for key, value in values.items() if isinstance(value, dict) for inner in value]

    def put(path: tuple[str, ...], value: Any) -> dict[str, Any]:
        changed: dict[str, Any] = json.loads(json.dumps(values))
        section = changed if len(path) == 1 else changed[path[0]]
        section[path[-1]] = value
        return changed

    return st.builds(put, st.sampled_from(paths), JSON)


@PROPERTIES
@given(_changed("config.json"))
def test_a_configuration_is_read_or_refused(values: dict[str, Any]) -> None:
    try:
        config = parse_config(values)
    except ConfigError:
        return
    assert config.text.d_model == config.vision.projection_dim == 160
    assert all(math.isfinite(value) for value in (config.text.dropout, config.vision.mlp_ratio))


@PROPERTIES
@given(_changed("preprocessor_config.json"))
def test_image_settings_are_finite_or_refused(values: dict[str, Any]) -> None:
    try:
        config = parse_image_config(values)
    except ConfigError:
        return
    assert min(config.std) > 0
    assert np.isfinite([*config.mean, *config.std, config.rescale_factor]).all()


@PROPERTIES
@given(st.one_of(st.binary(max_size=64), JSON))
def test_what_is_not_an_image_is_refused(source: Any) -> None:
    with pytest.raises(ImageError):
        open_image(source)


@PROPERTIES
@given(JSON, JSON)
def test_a_prompt_of_any_kind_is_checked(prompt: Any, text: Any) -> None:
    try:
        task, _ = check_prompt(prompt, text)
    except PromptError:
        return
    assert task is None or task in TASKS.values()
