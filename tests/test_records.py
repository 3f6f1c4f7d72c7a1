"""The recorded outputs of the remote code match, and damage to the model is noticed."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from florence2.generation import search as decoding
from florence2.generation import state
from florence2.generation.rules import ForcedId, NoRepeatNgram
from florence2.generation.state import SpecialIds
from florence2.model import bart
from florence2.model.florence2 import Florence2Model
from florence2.model.projection import PositionTable
from parity.records import compare_model, compare_pixels, compare_records, make_recorded_checkpoint
from parity.report import load_tolerances
from tests.release import keep


@pytest.mark.release
def test_everything_recorded() -> None:
    rows, tolerances = list(compare_records()), load_tolerances()
    assert len(rows) == 13
    assert [row for row in rows if not row.passes(tolerances)] == []


def test_tolerances_are_measured_not_round() -> None:
    """Float32 against float32 of another machine: none may be so wide that a wrong formula fits in."""
    tolerances = load_tolerances()
    limits = {"features": 2e-4, "encoder": 2e-4, "logits": 5e-4, "loss": 1e-4, "token log-probabilities": 2e-4}
    for stage, limit in limits.items():
        assert 0 < tolerances[f"records: {stage}"] < limit


# ---- mutations: every one must be noticed --------------------------------------------------------------------------


Differs = Callable[..., bool]


@pytest.fixture(scope="module")
def differs(tmp_path_factory: pytest.TempPathFactory) -> Differs:
    """Return whether the comparison on the first recorded run fails, up to its first row that does."""
    folder = tmp_path_factory.mktemp("recorded")
    make_recorded_checkpoint(folder)
    tolerances = load_tolerances()

    def differs(change: Callable[[Florence2Model], None] | None = None) -> bool:
        return any(not row.passes(tolerances) for row in compare_model(change, runs=1, folder=folder))

    return differs


@pytest.fixture(scope="module")
def searches_differ(differs: Differs) -> Differs:
    """The same for what comes after the image: its tokens are computed once, for they take most of the time."""
    kept: list[Tensor] = []

    def keep(model: Any) -> None:
        encode = model.encode_image

        def encode_once(*given: Any) -> Tensor:
            if not kept:
                kept.append(encode(*given))
            return kept[0]

        model.encode_image = encode_once

    assert not differs(keep) and kept
    return lambda: differs(keep)


def other_epsilon(model: Florence2Model) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def no_depthwise(model: Florence2Model) -> None:
    block: Any = model.vision_tower.blocks[2][1]  # type: ignore[index]
    nn.init.zeros_(block.channel_block.conv2.weight)
    nn.init.zeros_(block.channel_block.conv2.bias)


def swapped_pooling(model: Florence2Model) -> None:
    model.multi_modal_projector.sources = model.multi_modal_projector.sources[::-1]


def no_frame_embedding(model: Florence2Model) -> None:
    model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed.zero_()


def no_final_bias(model: Florence2Model) -> None:
    model.final_logits_bias.zero_()


def untransposed_projection(model: Florence2Model) -> None:
    square = model.multi_modal_projector.image_projection.weight[:, :64]
    square.data.copy_(square.data.T.clone())


@pytest.mark.release
@pytest.mark.parametrize(
    "change",
    [other_epsilon, no_depthwise, swapped_pooling, no_frame_embedding, no_final_bias, untransposed_projection],
)
def test_damaged_models_are_noticed(change: Callable[[Florence2Model], None], differs: Differs) -> None:
    assert differs(change)


@pytest.mark.release
def test_an_undamaged_model_is_not(differs: Differs) -> None:
    assert not differs()


_gelu, _logit_rules = F.gelu, state.logit_rules


def row_first(self: PositionTable, h: int, w: int) -> Tensor:
    rows, columns = self.row_embeddings.weight, self.column_embeddings.weight
    return torch.cat([rows[:h, None].expand(-1, w, -1), columns[:w].expand(h, -1, -1)], dim=-1)


def no_forced_ids(options: Any, ids: SpecialIds) -> list[Any]:
    return [rule for rule in _logit_rules(options, ids) if not isinstance(rule, ForcedId)]


@pytest.mark.parametrize(
    ("target", "name", "replacement"),
    keep(
        [1],
        [
            (F, "gelu", lambda x: _gelu(x, approximate="tanh")),
            (bart, "POSITION_OFFSET", 1),
            (PositionTable, "forward", row_first),
        ],
    ),
    ids=["gelu-tanh", "position-offset", "rows-before-columns"],
)
def test_changed_formulas_are_noticed(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, replacement: Any, differs: Differs
) -> None:
    assert differs(lambda model: monkeypatch.setattr(target, name, replacement))


@pytest.mark.release
@pytest.mark.parametrize(
    ("target", "name", "replacement"),
    [(state, "logit_rules", no_forced_ids), (decoding, "_NOT_STARTED", 0.0)],
    ids=["no-forced-ids", "beams-alike-at-start"],
)
def test_another_start_of_the_search_is_noticed(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, replacement: Any, searches_differ: Differs
) -> None:
    monkeypatch.setattr(target, name, replacement)
    assert searches_differ()


@pytest.mark.release
@pytest.mark.parametrize("shift", [-1, 1])
def test_an_ngram_rule_off_by_one_is_noticed(
    monkeypatch: pytest.MonkeyPatch, shift: int, searches_differ: Differs
) -> None:
    original = NoRepeatNgram.__call__
    monkeypatch.setattr(
        NoRepeatNgram,
        "__call__",
        lambda self, *rest: original(SimpleNamespace(size=self.size + shift), *rest),  # type: ignore[arg-type]
    )
    assert searches_differ()


@pytest.mark.release
def test_another_length_penalty_is_noticed(monkeypatch: pytest.MonkeyPatch, searches_differ: Differs) -> None:
    """Counting the start id as well."""
    original = decoding.BeamSearch.start

    def start(*arguments: Any) -> Any:
        state = original(*arguments)
        return replace(state, powers=state.powers.roll(-1, dims=1))

    monkeypatch.setattr(decoding.BeamSearch, "start", start)
    assert searches_differ()


def test_another_filter_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, _filter: original(self, size, Image.Resampling.BILINEAR)
    )
    row = compare_pixels()
    assert row.equal == 0
