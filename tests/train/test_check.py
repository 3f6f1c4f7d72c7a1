"""The dry run: what comes back is let through, and whatever does not is found."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import normalizers

from florence2.inputs.image import ImageConfig
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.processor import Processor
from florence2.train.check import CheckReport, check_samples
from florence2.train.samples import Sample
from florence2.train.sources import read_samples
from florence2.train.targets import boxes_target
from parity.recipe import GOLDEN
from recipes.nano.scene_tasks import SCENE_TASKS, ask
from recipes.nano.scenes import make_scene

PICTURE = Image.new("RGB", (8, 8))
A, B = "<loc_1><loc_2><loc_3><loc_4>", "<loc_5><loc_6><loc_7><loc_8>"
RING = "<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6>"
REGION = "<REGION_TO_SEGMENTATION><loc_1><loc_2><loc_3><loc_4>"
GROUND = "<CAPTION_TO_PHRASE_GROUNDING>a cup"
OPEN = "<OPEN_VOCABULARY_DETECTION>a cup"


@pytest.fixture(scope="module")
def real() -> Processor:
    """The published tokenizer."""
    config = ImageConfig(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Processor(FlorenceTokenizer(GOLDEN / "tokenizer.json"), config)


def check(processor: Processor, *pairs: tuple[str, str], max_length: int = 1024) -> CheckReport:
    return check_samples([Sample(PICTURE, pairs, "x")], processor, max_length)


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("<CAPTION>", " Two cups,\n <in> Zürich & 東京 🙂 "),
        ("<CAPTION>", "the cup at <loc_5>"),
        ("how many cups?", "2"),
        ("od", f"cup{A}spoon{B}"),
        ("<OD>", f"cup{A}{B}"),
        ("<OD>", f"Tasse à café {A}cup>2{B}"),
        ("<DENSE_REGION_CAPTION>", f"the image{A}"),
        ("<REGION_PROPOSAL>", A + B),
        (GROUND, f"a cup{A}"),
        (OPEN, f"a cup{A}{B}"),
        (OPEN, f"a cup<poly>{RING}<sep>{RING}</poly><poly>{RING}</poly>"),
        ("<OCR_WITH_REGION>", f"a<b{A}{B}\nit{B}{A}"),
        (REGION, RING),
        (REGION, f"{RING}<sep>{RING}"),
        (REGION, f"<poly>{RING}</poly><poly>{RING}<sep>{RING}</poly>"),
    ],
)
def test_what_comes_back_is_let_through(real: Processor, prefix: str, suffix: str) -> None:
    report = check(real, (prefix, suffix))
    assert report.findings == ()
    assert str(report).endswith("1 answer on 1 image: nothing is lost or cut.")


@pytest.mark.parametrize(
    ("prefix", "suffix", "words"),
    [
        (GROUND, f"it{A}a cup{B}", "'it' at .* is not read back"),
        (GROUND, f"a cup{A}the image{B}", "'the image' at .* is not read back"),
        ("<OD>", f"a<b{A}", "'a<b' at .* is not read back"),
        ("<OD>", f"cup\nspoon{A}", "is not read back"),
        ("<OD>", f"cup{A}spoon", "'spoon' has no location after it"),
        ("<OD>", "a cup", "'a cup' has no location after it"),
        ("<OD>", f"{A}cup{B}", "has no label before it"),
        ("<OD>", f"cup{A} {B}", "has no label before it"),
        ("<OD>", f"cup{A}<loc_5>", "5 locations follow 'cup'; a box has 4"),
        ("<OD>", "cup<loc_5><loc_2><loc_3><loc_4>", "swapped"),
        ("<OD>", "cup<loc_1><loc_2><loc_3><loc_1000>", "'<loc_1000>'"),
        ("<OD>", "cup<loc_1><loc_2><loc_3><loc_04>", "'<loc_04>'"),
        ("<OD>", f"<od>{A}", "not read back"),
        ("<REGION_PROPOSAL>", f"cup{A}", "does not belong there"),
        ("<OCR_WITH_REGION>", f"EXIT{A}{B}{A}{B}", "16 locations follow 'EXIT'; a quad has 8"),
        ("<OCR_WITH_REGION>", f"EXIT{A}", "4 locations follow 'EXIT'; a quad has 8"),
        ("<OCR_WITH_REGION>", A + B, "no label before it"),
        ("<OCR_WITH_REGION>", f"EX\nIT{A}{B}", "not read back"),
        (REGION, f"cup{RING}", "does not belong there"),
        (REGION, A, "4 locations; it needs x, y of at least three points"),
        (REGION, f"{RING}<loc_7>", "7 locations; it needs"),
        (REGION, f"{RING}<sep>", "0 locations; it needs"),
        (REGION, f"<poly>{RING}", "must have <poly> before and </poly> after"),
        (REGION, f"<poly>{RING}</poly>{RING}", "must have <poly> before and </poly> after"),
        (OPEN, f"<poly>{RING}</poly>", "no label before it"),
        ("<CAPTION>", "a cup</s>", "</s> in an answer"),
        ("<CAPTION>", "a <mask>", "<mask> in an answer"),
        ("<CAPTION>", "half \ud83d", "not valid Unicode"),
    ],
)
def test_what_does_not_is_found(real: Processor, prefix: str, suffix: str, words: str) -> None:
    report = check(real, (prefix, suffix), ("<CAPTION>", "a cup"))
    assert (report.lost, report.cut, report.refused, report.unreadable) == (1, 0, 0, 0)
    assert report.findings[0].name == "x"
    assert re.search(words, report.findings[0].text)
    assert report.findings[0].text in str(report)


def test_a_tokenizer_that_changes_the_text_is_found(real: Processor) -> None:
    """A file with a normalizer is refused, so this one, which nobody else has, is changed in memory."""
    tokenizer = FlorenceTokenizer(GOLDEN / "tokenizer.json").with_tokens(["<own>"])
    tokenizer._backend.normalizer = normalizers.Lowercase()
    lower = Processor(tokenizer, real.image_config)
    report = check(lower, ("<CAPTION>", "a Cup"), ("<CAPTION>", "a cup"))
    assert [finding.text for finding in report.findings] == [
        "'<CAPTION>': the tokenizer returns '<s>a cup</s>' for 'a Cup'."
    ]


def test_every_missing_location_is_found(real: Processor) -> None:
    pieces = re.findall(r"<loc_\d+>|[^<]+", f"cup{A}saucer{B}spoon{A}{B}")
    for left_out, piece in enumerate(pieces):
        if piece.startswith("<"):
            report = check(real, ("<OD>", "".join(pieces[:left_out] + pieces[left_out + 1 :])))
            assert report.lost == 1, left_out


def test_what_targets_build_comes_back(real: Processor) -> None:
    rng = random.Random(1)
    for _ in range(50):
        size = (rng.randint(1, 3000), rng.randint(1, 3000))
        rows = []
        for _ in range(rng.randint(1, 8)):
            x, y = (sorted(rng.uniform(-5, side + 5) for _ in range(2)) for side in size)
            rows.append((rng.choice(["cup", "a red cup", "Löffel"]), (x[0], y[0], x[1], y[1])))
        assert not check(real, ("<OD>", boxes_target(rows, size))).findings


def test_every_task_of_the_scenes_comes_back(real: Processor) -> None:
    scenes = [make_scene(1, index) for index in range(3)]
    asked = [ask(task, scene, random.Random(index)) for index, scene in enumerate(scenes) for task in SCENE_TASKS]
    pairs = [(one.prefix, one.suffix) for one in asked if one is not None]
    report = check(real, *pairs)
    assert report.findings == ()
    assert sorted(row.task for row in report.tasks) == sorted({prefix.split(">")[0] + ">" for prefix, _ in pairs})
    assert len(report.tasks) >= 12


def test_lengths_by_hand(real: Processor) -> None:
    """A location is one id, "cup" is one; `<s>` and `</s>` are two more."""
    boxes = [f"cup{A * count}" for count in (1, 2, 4)]
    report = check(real, *(("<OD>", suffix) for suffix in boxes), ("<CAPTION>", "cup"), max_length=18)
    detect, caption = report.tasks
    assert (detect.task, detect.answers, detect.lost, detect.cut, detect.median, detect.longest) == (
        "<OD>", 3, 0, 1, 11, 19,
    )  # fmt: skip
    assert (caption.task, caption.answers, caption.cut, caption.median, caption.longest) == ("<CAPTION>", 1, 0, 3, 3)
    assert report.cut == 1
    assert "19 ids, but at most 18 fit" in report.findings[0].text
    assert check(real, ("<OD>", boxes[2]), max_length=19).cut == 0


def test_prompts_that_nobody_can_ask(real: Processor) -> None:
    pairs = [("<VQA>how many?", "2"), ("<REGION_TO_OCR>", "EXIT"), (GROUND, f"a cup{A}"), ("at <loc_1000>?", "a cup")]
    report = check(real, *pairs)
    assert (report.refused, report.lost) == (3, 0)
    fits = len(real.prompt(GROUND))
    samples = [Sample(PICTURE, ((GROUND, f"a cup{A}"),))]
    assert check_samples(samples, real, 1024, fits).refused == 0
    report = check_samples(samples, real, 1024, fits - 1)
    assert report.refused == 1
    assert report.findings[0].name == "sample 0"


def test_images_are_read_to_their_end_and_once(real: Processor, tmp_path: Path) -> None:
    Image.effect_noise((200, 200), 50).save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(data[: len(data) // 2])
    names = ["good.jpg", "short.jpg", "short.jpg", "absent.jpg"]
    samples = [Sample(tmp_path / name, (("<CAPTION>", "noise"),), name) for name in names]
    report = check_samples(samples, real, 1024)
    assert (report.images, report.unreadable, report.answers) == (3, 2, 4)
    assert [finding.name for finding in report.findings] == ["short.jpg", "absent.jpg"]
    assert "truncated" in report.findings[0].text
    assert "does not exist" in report.findings[1].text
    assert "2 images unreadable" in str(report)


def test_a_file_to_its_report(real: Processor, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    rows: list[dict[str, Any]] = [
        {"prefix": "<OD>", "boxes": [{"label": "cup", "box": [0, 0, 4, 8]}]},
        {"prefix": GROUND, "boxes": [{"label": "it", "box": [0, 0, 4, 8]}]},
        {"prefix": "<CAPTION>", "suffix": "a cup " * 600},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows))
    report = check_samples(read_samples(path), real, 1024)
    assert (report.images, report.answers, report.lost, report.cut) == (1, 3, 1, 1)
    lines = str(report).splitlines()
    assert lines[0].split() == ["task", "answers", "lost", "cut", "median", "ids", "longest"]
    assert lines[1].split() == ["<OD>", "1", "0", "0", "7", "7"]
    assert lines[2].split()[:4] == ["<CAPTION_TO_PHRASE_GROUNDING>", "1", "1", "0"]
    assert lines[4] == ("3 answers on 1 image: 1 lost in part, 1 cut, 0 prompts refused, 0 images unreadable.")
    assert lines[5].startswith("lost: a.png (line 1, line 2, line 3): '<CAPTION_TO_PHRASE_GROUNDING>a cup': 'it' at")


def test_many_findings_are_counted_not_listed(real: Processor) -> None:
    report = check(real, *[("<OD>", "a cup")] * 30)
    assert report.lost == len(report.findings) == 30
    assert str(report).splitlines()[-1] == "... and 10 more"
    assert len(str(report).splitlines()) == 2 + 1 + 20 + 1
