"""The table of names against what runs show, and patterns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from florence2 import Florence2, GenerationOptions
from florence2.errors import OptionError
from florence2.model.trace import Trace
from florence2.tracing.budget import AnswerSizes, active_rules, answer_bytes, check_fits, image_bytes, longest_answer
from florence2.tracing.names import RULES, describe_names, image_letters, module_of, names_of, pooled_spans, starred
from florence2.tracing.recording import Tracing
from florence2.tracing.selection import select
from parity.cases import shapes
from parity.recipe import make_model
from tests.release import keep


class Everything(Trace):
    """Keeps the shape, type and size of whatever is shown."""

    def __init__(self) -> None:
        self.seen: dict[str, list[torch.Tensor]] = {}

    def wants(self, name: str) -> bool:
        return True

    def enters(self, prefix: str) -> bool:
        return True

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.seen.setdefault(name, []).append(value)
        return value


def run_all(
    which: int, options: GenerationOptions, watch: Callable[[nn.Module], object] = lambda model: None
) -> Everything:
    """Two images and prompts through a model, at the level of its own functions."""
    from florence2.generation.generate import generate

    shape = shapes()[which]
    model, shown = make_model(shape.config, shape.seed, 0.0), Everything()
    watch(model)
    with torch.no_grad():
        tokens = model.encode_image(torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1)), shown)
        memory = model.encode(tokens, torch.tensor([[0, 7, 2], [0, 9, 2]]), trace=shown)
    generate(model, memory, options, trace=shown)
    return shown


@pytest.mark.parametrize(
    ("which", "beams"), keep([0, 3, 5], [(which, beams) for which in (2, 3, 5) for beams in (1, 3)])
)
def test_the_table_is_what_runs_show_name_by_name_and_size_by_size(which: int, beams: int) -> None:
    options = GenerationOptions(
        num_beams=beams, max_new_tokens=5, min_new_tokens=9, repetition_penalty=1.1, no_repeat_ngram_size=2
    )
    config = shapes()[which].config
    shown = run_all(which, options)
    names = names_of(config)
    assert list(shown.seen) and set(shown.seen) == {name.name for name in names}
    tokens = image_letters(config.vision, (2, 3, 96, 128), -1)["N"]
    answer = AnswerSizes(2, tokens, 3, options).letters()
    for name in names:
        letters = {**image_letters(config.vision, (2, 3, 96, 128), name.stage), **answer}
        values = shown.seen[name.name]
        assert len(values) == (5 if name.when == "step" else 1), name
        for t, value in enumerate(values, start=1):
            bans = value.shape[0] if "bans" in name.shape else 0
            assert tuple(value.shape) == name.shape_for({**letters, "t": t, "bans": bans}), name
            dtype = "float32" if name.dtype == "model" else name.dtype
            assert value.dtype == getattr(torch, dtype), name


@pytest.mark.parametrize("beams", [1, 3])
def test_bytes_are_predicted_exactly(beams: int) -> None:
    options = GenerationOptions(num_beams=beams, max_new_tokens=5, min_new_tokens=9)
    shown, config = run_all(3, options), shapes()[3].config
    names = [name for name in names_of(config) if "bans" not in name.shape]
    images = {name.name for name in names if name.when == "image"}
    held = {name.name: sum(value.nbytes for value in shown.seen.get(name.name, [])) for name in names}
    tokens = image_letters(config.vision, (2, 3, 96, 128), -1)["N"]
    assert image_bytes(names, config, (2, 3, 96, 128)) == sum(held[name] for name in images)
    assert answer_bytes(names, config, AnswerSizes(2, tokens, 3, options)) == sum(
        count for name, count in held.items() if name not in images
    )


def test_rules_are_off_by_the_options() -> None:
    options = GenerationOptions(forced_bos_token_id=None, forced_eos_token_id=None, no_repeat_ngram_size=0)
    assert active_rules(options) == ()
    on = GenerationOptions(repetition_penalty=1.1, min_new_tokens=2)
    assert active_rules(on) == RULES


def test_the_longest_answer_that_fits() -> None:
    config = shapes()[3].config
    names = [name for name in names_of(config) if name.name == "logits"]
    sizes = AnswerSizes(1, 9, 3, GenerationOptions(num_beams=2, max_new_tokens=100))
    step = 2 * config.text.vocab_size * 4
    assert answer_bytes(names, config, sizes) == 100 * step
    assert longest_answer(names, config, sizes, torch.float32, 40 * step) == 40
    assert longest_answer(names, config, sizes, torch.float32, 40 * step - 1) == 39
    assert longest_answer(names, config, sizes, torch.float32, step - 1) == 0
    check_fits(5, 5, 10, "x", "")
    with pytest.raises(
        OptionError, match="The trace of x may take 6.0 MB in addition to the 5.0 MB already held, more than"
    ):
        check_fits(6_000_000, 5_000_000, 10_000_000, "x", "")


def test_patterns() -> None:
    names = names_of(shapes()[2].config)

    def found(pattern: str, exactly: bool = False) -> list[str]:
        return select([pattern], names, exactly)[pattern]

    assert found("decoder.layers.*.cross_attention.weights") == [
        f"decoder.layers.{i}.cross_attention.weights" for i in range(4)
    ]
    below = found("decoder.layers.1.cross_attention")
    assert [name.rpartition(".")[2] for name in below] == [
        "queries", "keys", "values", "weights", "heads", "cross_attention"
    ]  # fmt: skip
    assert found("=encoder.layers.*") == [f"encoder.layers.{i}" for i in range(3)]
    assert found("encoder.layers.*", exactly=True) == found("=encoder.layers.*")
    assert found("**") == [name.name for name in names]
    assert len(found("**.weights")) == 2 * 4 + 3 + 2 * 4
    assert set(found("**.after_*")) == {name.name for name in names if ".after_" in name.name}
    assert found("scores") == [f"scores.{rule}" for rule in RULES] + ["scores"]
    assert found("vision_tower.blocks.1.0.channel_block.ffn") == [
        "vision_tower.blocks.1.0.channel_block.ffn.before",
        "vision_tower.blocks.1.0.channel_block.ffn.hidden",
        "vision_tower.blocks.1.0.channel_block.ffn",
    ]


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("decoder.layers.0.cros_attention", "decoder.layers.0.cross_attention"),
        ("decoder.layers.0.encoder_attn", "decoder.layers.0"),
        ("decoder.layers.*.cross_attention.weight", "decoder.layers.*.cross_attention.weights"),
        ("decoder.layers.7.mlp", "decoder.layers.0.mlp"),
        ("vision_towr", "vision_tower"),
        ("logit", "logits"),
    ],
)
def test_unknown_names_get_the_nearest(pattern: str, nearest: str) -> None:
    with pytest.raises(OptionError) as error:
        select([pattern], names_of(shapes()[3].config))
    assert f"called {pattern!r}" in str(error.value) and nearest in str(error.value)


@pytest.mark.parametrize("pattern", ["=decoder.layers", "=vision_tower.blocks.*", "=scores.*.x"])
def test_a_module_without_a_value_of_its_own(pattern: str) -> None:
    """Nearest names are never the name itself: those that have values below them are named with `.**`."""
    names, plain = names_of(shapes()[3].config), pattern.removeprefix("=")
    with pytest.raises(OptionError) as error:
        select([pattern], names)
    if pattern == "=scores.*.x":
        assert f"called {plain!r}" in str(error.value)
        return
    assert f"{plain!r} has no value of its own, only names below it: {plain}.** selects all of them" in str(error.value)
    assert select([f"={plain}.**"], names)[f"={plain}.**"] == select([plain], names)[plain]


@pytest.mark.parametrize("pattern", [None, 3, ["decoder.layers.*"]])
def test_a_pattern_is_text(small: Florence2, pattern: Any) -> None:
    with pytest.raises(OptionError, match="A name or pattern is text"), small.trace(pattern):
        raise AssertionError


def test_a_name_like_no_other() -> None:
    with pytest.raises(OptionError, match="No name is similar"):
        select(["qqqqqqqqqq"], names_of(shapes()[3].config))


def numbers(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in order: equal for tensors that differ in shape alone."""
    return tensor.flatten().sort().values


def test_the_module_of_a_name_gives_its_values() -> None:
    """Compared with forward hooks on every module; and no other name is the output of a module."""
    outputs: dict[str, list[Tensor]] = {}

    def watch(model: nn.Module) -> None:
        for path, part in model.named_modules():
            part.register_forward_hook(lambda m, i, output, path=path: outputs.setdefault(path, []).append(output))

    config = shapes()[3].config
    shown = run_all(3, GenerationOptions(num_beams=2, max_new_tokens=3, min_new_tokens=4), watch)
    given = {path: list(map(numbers, seen)) for path, seen in outputs.items()}
    for name in (name.name for name in names_of(config) if not name.searched):
        path, value = module_of(name), numbers(shown.seen.get(name, [torch.empty(0)])[-1])
        if path is not None:
            assert any(torch.equal(output, value) for output in given[path]), name
        elif name != "image_tokens" and value.numel():  # which the projector gave to another call
            assert not any(torch.equal(one, value) for seen in given.values() for one in seen), name


def test_the_module_of_a_pattern() -> None:
    assert module_of("decoder.layers.*.cross_attention") == "language_model.decoder.layers.*.encoder_attn"
    assert module_of("encoder.layers.11.self_attention.keys") == "language_model.encoder.layers.11.self_attn.k_proj"
    assert (
        module_of("vision_tower.blocks.2.4.channel_block.ffn.before") == "vision_tower.blocks.2.4.channel_block.ffn.fc1"
    )
    assert (
        module_of("decoder.layers.0.mlp.hidden") is module_of("logits") is module_of("decoder.layers.0.adapter") is None
    )


def test_what_is_described() -> None:
    config = shapes()[2].config
    text = describe_names(config)
    assert {line.split()[0] for line in text.splitlines()} == {starred(name.name) for name in names_of(config)}
    assert "decoder.layers.*.cross_attention.weights" in text and "(B, heads, K, S)" in text
    assert "what the attention to the memory adds [language_model.decoder.layers.*.encoder_attn]\n" in text


def test_own_shapes() -> None:
    own = {name.name: name.own_shape for name in names_of(shapes()[3].config)}
    assert own["decoder.layers.0.cross_attention.weights"] == ("steps", "heads", "K", "S")
    assert own["decoder.layers.0.self_attention.weights"] == ("steps", "heads", "K", "steps")
    assert own["decoder.layers.0"] == ("steps", "K", "D") and own["logits"] == ("steps", "K", "V")
    assert own["encoder.layers.0"] == ("S", "D")
    assert own["vision_tower.blocks.0.0.spatial_block.window_attn.heads"] == ("windows", "heads", "M", "d")


def test_where_image_tokens_are() -> None:
    published, thrice = shapes()[0].config.vision, shapes()[5].config.vision
    assert pooled_spans(published, (24, 24)) == {"spatial_avg_pool": slice(0, 1), "temporal_avg_pool": slice(1, 577)}
    assert pooled_spans(thrice, (2, 3)) == {
        "temporal_avg_pool": slice(0, 6),
        "last_frame": slice(6, 12),
        "spatial_avg_pool": slice(12, 13),
    }


def test_a_trace_is_refused_before_it_is_taken(
    small: Florence2, images: list[Image.Image], beams: GenerationOptions
) -> None:
    with small.trace("vision_tower", limit=1_000_000) as t:
        with pytest.raises(OptionError, match=r"1 image of 160 x 224 pixels may take [\d.]+ MB, more than the limit"):
            small.run("<OD>", images[0], options=beams)
        assert t.bytes == 0
    encoded = small.encode_image(images[0])
    with small.trace("logits", limit=5_000_000) as t:
        with pytest.raises(OptionError, match=r"1 answer with 3 beams .* lower max_new_tokens from 9 to 8, name fewer"):
            small.run("<OD>", encoded, options=beams)
        small.run("<OD>", encoded, options=beams.changed(max_new_tokens=8))
        assert 0 < t.bytes <= 5_000_000


@pytest.mark.parametrize("limit", [0, -1, 1.5, "2 GB", True])
def test_a_limit_is_a_number_of_bytes(limit: Any) -> None:
    with pytest.raises(OptionError, match="number of bytes of at least 1"):
        Tracing(shapes()[3].config, ["logits"], limit)


def test_where_nothing_was_predicted_the_limit_still_holds(small: Florence2) -> None:
    recording = Tracing(small.model.config, ["logits"], limit=100).start()
    with pytest.raises(OptionError, match="The trace holds 0.6 MB, more than the limit"), torch.no_grad():
        small.model.decode(torch.tensor([[2, 0, 5]]), torch.randn(1, 4, 64), trace=recording)
