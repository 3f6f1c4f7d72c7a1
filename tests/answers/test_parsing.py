"""Generated text -> regions, as the reference reads it."""

import time
from typing import get_args

import pytest

from florence2.answers.parsing import clean_label, find_region_tokens, find_regions, find_written, remove_markers
from florence2.inputs.coordinates import LOCATION
from florence2.inputs.tasks import AnswerKind

BOX = "<loc_100><loc_200><loc_300><loc_400>"
BINS = (100, 200, 300, 400)


def labels_and_bins(kind: AnswerKind, text: str) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    """Return the label and bins of every region."""
    return [(region.label, region.bins) for region in find_regions(kind, text)]


def test_boxes_several_to_a_label() -> None:
    """A rest of fewer than four locations is dropped."""
    text = f"</s><s>car{BOX}{BOX}wheel{BOX}<loc_1></s>"
    assert labels_and_bins("boxes", text) == [("car", (BINS,)), ("car", (BINS,)), ("wheel", (BINS,))]
    assert {region.shape for region in find_regions("boxes", text)} == {"box"}


def test_a_line_break_spoils_a_label_but_not_the_next() -> None:
    assert labels_and_bins("boxes", f"a\nb{BOX}c{BOX}") == [("c", (BINS,))]
    assert labels_and_bins("boxes", f"\n c{BOX}") == [("c", (BINS,))]


def test_proposals_have_no_labels() -> None:
    assert labels_and_bins("proposals", f"</s><s>{BOX}<loc_1><loc_2></s>") == [("", (BINS,))]
    assert labels_and_bins("boxes", f"</s><s>{BOX}</s>") == []


@pytest.mark.parametrize("word", ["it", "a group", "the image", "each other", "I"])
def test_pronouns_ground_nothing(word: str) -> None:
    assert labels_and_bins("phrases", f"{word}{BOX}A car{BOX}") == [("A car", (BINS,))]
    assert labels_and_bins("boxes", f"{word}{BOX}") == [(word, (BINS,))]


def test_quads_keep_all_but_the_start_in_their_labels() -> None:
    text = "</s><s>STOP" + BOX + BOX + "\n出口" + BOX + BOX
    assert labels_and_bins("quads", text) == [("</s>STOP", (BINS * 2,)), ("出口", (BINS * 2,))]


def test_polygons() -> None:
    """Without `<poly>` all outlines are one object's; a coordinate without its partner is dropped."""
    assert labels_and_bins("polygons", BOX + "<sep>" + BOX + "<loc_9>") == [("", (BINS, BINS))]
    assert labels_and_bins("polygons", f"<poly>{BOX}</poly><poly>{BOX}<sep>{BOX}</poly>") == [
        ("", (BINS,)),
        ("", (BINS, BINS)),
    ]
    assert labels_and_bins("polygons", f"<loc_1><sep>{BOX}<sep>") == [("", ((), BINS))]


def test_an_unclosed_polygon_is_read_as_one() -> None:
    assert labels_and_bins("polygons", f"<poly>{BOX}") == [("", (BINS,))]


def test_boxes_unless_there_is_a_polygon() -> None:
    for text, shape in ((f"cat{BOX}", "box"), (f"cat<poly>{BOX}</poly>", "polygon")):
        (region,) = find_regions("boxes_or_polygons", text)
        assert (region.shape, region.label, region.bins) == (shape, "cat", (BINS,))


@pytest.mark.parametrize("kind", ["boxes", "phrases", "proposals"])
def test_a_polygon_where_boxes_are_asked_for_is_read_as_one(kind: AnswerKind) -> None:
    (region,) = find_regions(kind, f"cat<poly>{BOX}</poly>")
    assert (region.shape, region.bins) == ("box", (BINS,))


@pytest.mark.parametrize("kind", get_args(AnswerKind))
def test_positions_are_those_of_the_text_before_markers_were_removed(kind: AnswerKind) -> None:
    text = f"</s><s>a <pad>car{BOX}{BOX}<sep>{BOX}</s>"
    regions = find_regions(kind, text)
    for region in regions:
        written = "".join(text[position] for row in region.positions for position in row)
        assert written == "".join(f"<loc_{bin}>" for row in region.bins for bin in row)
    assert len(regions) == {"text": 0, "quads": 1, "polygons": 1}.get(kind, 3)


def test_the_tokens_of_each_region() -> None:
    """The location tokens alone, counted without the start id; one to three that remain belong to no box."""
    locations = [f"<loc_{i}>" for i in range(9)]
    texts = ["</s>", "<s>", "car", *locations, "<od>", " wh", "eel", *locations[:4]]
    assert find_region_tokens("boxes", texts) == [(2, 3, 4, 5), (6, 7, 8, 9), (14, 15, 16, 17)]
    rings = ["</s>", "<s>", "cat", *["<loc_1>"] * 4, "<sep>", *["<loc_2>"] * 6, "</s>"]
    assert find_region_tokens("polygons", rings) == [(2, 3, 4, 5, 7, 8, 9, 10, 11, 12)]
    assert find_region_tokens("text", texts) == []


def test_the_tokens_of_a_label_are_neither_markers_nor_the_start() -> None:
    corners = [f"<loc_{i}>" for i in range(8)]
    (quad,) = find_written("quads", ["</s>", "<s>", "ST", "</s>", "OP", *corners, "</s>"])
    assert (quad.label, quad.rows) == ((1, 3), (tuple(range(4, 12)),)) and quad.region.label == "</s>ST</s>OP"


def test_the_tokens_of_an_outlines_label_follow_the_rest_of_a_location() -> None:
    outline = ["<poly>", *[f"<loc_{i}>" for i in range(4)], "</poly>"]
    written = find_written("boxes_or_polygons", ["</s>", "a", " cat", *outline, "<loc_7>", "big", " dog", *outline])
    assert [(each.region.label, each.label) for each in written] == [("a cat", (0, 1)), ("big dog", (9, 10))]
    assert [each.rows for each in written] == [((3, 4, 5, 6),), ((12, 13, 14, 15),)]


def test_removed_markers_leave_every_character_its_position() -> None:
    text, origin = remove_markers("</s><s>a<pad>b</s>")
    assert text == "ab" and list(origin) == [7, 13]
    assert remove_markers("</s><s>a", ("<s>",))[0] == "</s>a"


@pytest.mark.parametrize(
    ("label", "clean"),
    [("</s>STOP", "STOP"), ("od>", ""), ("loc_5>od>car ", "car"), ("a>b", "a>b"), ("<loc_5>a<od>b", "ab")],
)
def test_labels_without_the_remains_of_tags(label: str, clean: str) -> None:
    assert clean_label(label) == clean


@pytest.mark.parametrize("kind", get_args(AnswerKind))
def test_long_texts_take_linear_time(kind: AnswerKind) -> None:
    """Without care, a search from each of 100,000 letters to the end of the text: minutes."""
    assert find_regions(kind, "word " * 20_000 + "<loc_1>" * 3) == []


TAGS = ("<loc_1>", "<sep>", "<poly>", "</poly>", "<s>", "</s>", "<pad>", "<od>", "<loc_12345>")
PIECES = (*TAGS, ">", "<", "<>", "<loc_", "<s> ", " ", "a", "\n", "od>", "loc_5>", "a\n", "<loc_1>a", "a" + BOX)


@pytest.mark.parametrize("piece", PIECES)
def test_any_text_takes_linear_time(piece: str) -> None:
    """50,000 characters of one piece, alone and around regions; where a pattern is quadratic: 2 s to a minute."""
    text = piece * (50_000 // len(piece))
    start = time.process_time()
    for kind in get_args(AnswerKind):
        for whole in (text, f"{text}{BOX}{BOX}", f"a{BOX}{BOX}{text}", f"{text}\nx{BOX}{BOX}"):
            for region in find_regions(kind, whole):
                clean_label(region.label)
    assert time.process_time() - start < 1  # 28 texts, which take 0.13 s together


def test_long_rings_and_labels_take_linear_time() -> None:
    """Runs that no `<sep>` ends, `<poly>` that nothing closes, spaces before a line break: quadratic in patterns."""
    locations = "<loc_1>" * 14_000
    start = time.process_time()
    assert find_regions("polygons", f"<poly>{locations}<poly></poly>") == []
    assert find_regions("polygons", "</poly>" + "<poly>" * 16_000 + BOX) == []
    assert find_regions("boxes", " " * 50_000 + "a" * 50_000 + "\n" + BOX) == []
    assert time.process_time() - start < 1


@pytest.mark.parametrize("digits", [5, 39, 400, 5000])
@pytest.mark.parametrize("kind", get_args(AnswerKind))
def test_a_location_has_at_most_four_digits(kind: AnswerKind, digits: int) -> None:
    long = f"<loc_{'9' * digits}>"
    assert find_regions(kind, "cat" + long * 8) == []
    assert all(region.bins == (BINS,) for region in find_regions(kind, f"cat{long}dog{BOX}{long}"))
    assert [bins for _, bins in labels_and_bins("boxes", "cat" + "<loc_9999>" * 4)] == [((9999,) * 4,)]


@pytest.mark.parametrize("digit", ["\u0663", "\uff13", "\u0969", "\U0001d7d1"])
@pytest.mark.parametrize("kind", get_args(AnswerKind))
def test_a_digit_of_a_location_is_0_to_9(kind: AnswerKind, digit: str) -> None:
    """The model has no other tokens, so other digits are letters that it wrote or that a user put in."""
    other = f"<loc_{digit}>"
    assert not LOCATION.search(other)
    assert find_regions(kind, "cat" + other * 8) == []
    assert all(region.bins == (BINS,) for region in find_regions(kind, f"cat{BOX}{other}"))
    assert clean_label(f"loc_{digit}>cat") == f"loc_{digit}>cat" and clean_label("loc_3>cat") == "cat"


def test_a_run_without_a_label_loses_its_first_tag() -> None:
    """As in the reference, where "loc_1>" is then a label, and four more tags are needed."""
    assert labels_and_bins("boxes", "<loc_1>" + BOX) == [("loc_1>", (BINS,))]
    assert labels_and_bins("boxes_or_polygons", "<poly>" + BOX) == [("poly>", (BINS,))]
    assert labels_and_bins("boxes", BOX) == []


def test_quads_without_a_label() -> None:
    """A label has at least one character, if it is a tag; it ends at the line."""
    assert labels_and_bins("quads", "<loc_7>" + BOX + BOX) == [("<loc_7>", (BINS * 2,))]
    assert labels_and_bins("quads", f"a\n{BOX}{BOX}\nb{BOX}{BOX}") == [("b", (BINS * 2,))]
    assert labels_and_bins("quads", f"{BOX}{BOX}and{BOX}{BOX}") == [(f"{BOX}{BOX}and", (BINS * 2,))]
