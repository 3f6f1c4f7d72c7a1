"""Tensor names: Microsoft's, transformers' native ones, and canonical ones, with one set of rules between them.

Canonical names are the native ones without the leading "model.". A rule is a pair of templates, a layout's and the
canonical one. Each name matches exactly one rule, in either direction, and a rule covers everything below a module
(`...qkv.weight`, `...qkv.lora_A.weight`). A name that a layout has no rule for, such as one of a module that somebody
added to the model, is stored as "extra." and the canonical name, in both layouts. Only `describe.py`, `checkpoint.py`,
`adapters.py` and `checks` use this module.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from functools import lru_cache
from itertools import chain, islice

from florence2.model.config import Layout

SHARED = "language_model.shared.weight"
HEAD = "lm_head.weight"
ENCODER_EMBEDDING = "language_model.encoder.embed_tokens.weight"
DECODER_EMBEDDING = "language_model.decoder.embed_tokens.weight"
TIED_TO_SHARED = frozenset((HEAD, ENCODER_EMBEDDING, DECODER_EMBEDDING))
"""Canonical names of the other uses of the token embedding; a file may hold it under these too, or only."""
MAY_DIFFER: dict[Layout, frozenset[str]] = {
    "microsoft": frozenset((HEAD,)),
    "native": frozenset((HEAD, DECODER_EMBEDDING)),
}
"""Those that may have values of their own, by layout: Microsoft's code has one embedding for prompts and answers."""

TRANSPOSED = {"microsoft": frozenset(("multi_modal_projector.image_projection.weight",)), "native": frozenset[str]()}
"""Canonical names of tensors that the layout stores transposed."""

OPTIONAL = frozenset(("final_logits_bias",))
"""Canonical names of tensors that the native layout does not have; they are zero then."""
_EXTRA = "extra."
_MOST_WRAPPERS = 5  # prefixes that are looked for, one inside another
_FEW = 10  # fewer names than one in so many do not show a wrapper

_BLOCK = "vision_tower.blocks.{stage}.{index}."
_RULES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "microsoft": (
        ("image_projection", "multi_modal_projector.image_projection.weight"),
        ("image_proj_norm.{rest}", "multi_modal_projector.image_proj_norm.{rest}"),
        ("image_pos_embed.{rest}", "multi_modal_projector.image_position_embed.{rest}"),
        ("visual_temporal_embed.{rest}", "multi_modal_projector.visual_temporal_embed.{rest}"),
        ("vision_tower.convs.{stage}.proj.{rest}", "vision_tower.convs.{stage}.conv.{rest}"),
        ("vision_tower.convs.{stage}.norm.{rest}", "vision_tower.convs.{stage}.norm.{rest}"),
        (_BLOCK + "{block}.{conv}.fn.dw.{rest}", _BLOCK + "{block}.{conv}.{rest}"),
        (_BLOCK + "spatial_block.window_attn.norm.{rest}", _BLOCK + "spatial_block.norm1.{rest}"),
        (_BLOCK + "channel_block.channel_attn.norm.{rest}", _BLOCK + "channel_block.norm1.{rest}"),
        (_BLOCK + "{block}.{attn}.fn.{rest}", _BLOCK + "{block}.{attn}.{rest}"),
        (_BLOCK + "{block}.ffn.norm.{rest}", _BLOCK + "{block}.norm2.{rest}"),
        (_BLOCK + "{block}.ffn.fn.net.{rest}", _BLOCK + "{block}.ffn.{rest}"),
        ("language_model.final_logits_bias", "final_logits_bias"),
        ("language_model.lm_head.{rest}", "lm_head.{rest}"),
        ("language_model.model.{rest}", "language_model.{rest}"),
    ),
    "native": (
        ("model.{part}.{rest}", "{part}.{rest}"),
        ("lm_head.{rest}", "lm_head.{rest}"),
    ),
}
_HOLES = {
    "stage": r"[0-9]+",
    "index": r"[0-9]+",
    "block": "spatial_block|channel_block",
    "conv": "conv1|conv2",
    "attn": "window_attn|channel_attn",
    "part": "vision_tower|multi_modal_projector|language_model",
    "rest": ".+",
}


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda hole: f"(?P<{hole[1]}>{_HOLES[hole[1]]})", re.escape(template)))


_TO_CANONICAL = {layout: [(_pattern(a), b) for a, b in rules] for layout, rules in _RULES.items()}
_FROM_CANONICAL = {layout: [(_pattern(b), a) for a, b in rules] for layout, rules in _RULES.items()}


def detect_layout(names: Iterable[str]) -> Layout | None:
    """Return the layout whose rules know more of `names`; None when neither knows any."""
    known = _count_known(list(names))
    best = max(known, key=known.__getitem__)
    return best if known[best] else None


def foreign_prefixes(names: Iterable[str]) -> dict[str, int]:
    """Return what wrappers have put before names, such as "module.", each with the number of these names.

    Native names begin with "model." themselves, so the rules decide: with a prefix removed, a name is known. Modules of
    the user's own are stored as "extra.", and copies of others would then be there twice; neither has a prefix. Nor
    have a few names among many, which are damage.
    """
    names = list(names)
    best = max((_prefixes(names, layout) for layout in _TO_CANONICAL), key=_fewest_unknown)
    prefixed = [prefix for name, prefix in best.items() if prefix and not name.startswith(_EXTRA)]
    bare = {name.removeprefix(prefix) for name, prefix in best.items()}
    if len(bare) < len(best) or _FEW * len(prefixed) < len(names):
        return {}
    return dict(Counter(prefixed))


def _prefixes(names: Iterable[str], layout: Layout) -> dict[str, str]:
    """Return the shortest prefix of each name without which the layout's rules know it."""
    found: dict[str, str] = {}
    for name in names:
        dots = islice(re.finditer(r"\.", name), _MOST_WRAPPERS)
        for prefix in chain([""], (name[: dot.end()] for dot in dots)):
            if to_canonical(name.removeprefix(prefix), layout) is not None:
                found[name] = prefix
                break
    return found


def _fewest_unknown(prefixes: Mapping[str, str]) -> tuple[int, int]:
    return len(prefixes), -sum(map(bool, prefixes.values()))


def _count_known(names: list[str]) -> dict[Layout, int]:
    """Return how many of the names each layout's rules know."""
    return {layout: sum(to_canonical(name, layout) is not None for name in names) for layout in _TO_CANONICAL}


@lru_cache(maxsize=4096)  # a checkpoint's names are looked up many times
def to_canonical(name: str, layout: Layout) -> str | None:
    """Return the canonical name of a name in the layout; None when no rule knows it."""
    return _rename(name, _TO_CANONICAL[layout])


def from_canonical(name: str, layout: Layout) -> str | None:
    """Return the layout's name of a canonical name; None when the layout has no such tensor."""
    return _rename(name, _FROM_CANONICAL[layout])


def stored_name(canonical: str, layout: Layout) -> str | None:
    """Return the name under which the layout stores a canonical name; None when it cannot hold such a tensor."""
    name = from_canonical(canonical, layout)
    return name or (None if canonical in OPTIONAL else f"{_EXTRA}{canonical}")


def canonical_name(stored: str, layout: Layout) -> str | None:
    """Return the canonical name of a stored name, "extra." ones included; None when no rule knows it."""
    canonical = to_canonical(stored, layout)
    extra = stored.removeprefix(_EXTRA) if stored.startswith(_EXTRA) else None
    return canonical or extra


def cannot_be_stored(canonical: str, layout: Layout) -> bool:
    """Return whether a canonical name would come back as another one, or as a use of the token embedding."""
    stored = stored_name(canonical, layout)
    return stored is not None and held_name(canonical_name(stored, layout)) != canonical


def held_name(canonical: str | None, own: Container[str] = ()) -> str | None:
    """Return the name under which a model holds a tensor: uses of the token embedding not in `own` are one tensor."""
    return SHARED if canonical in TIED_TO_SHARED and canonical not in own else canonical


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    names = [template.format(**match.groupdict()) for pattern, template in rules if (match := pattern.fullmatch(name))]
    assert len(names) <= 1, f"{name} matches {len(names)} rules"
    return names[0] if names else None
