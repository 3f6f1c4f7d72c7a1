"""`python -m recipes.nano.write_tables DIR`: synthetic scenes in the official layouts of all benchmark tables.

The files are data to try `florence2 evaluate TABLE --data DIR` with, where no benchmark is at hand.
"""

import argparse
import json
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.errors import OptionError
from recipes.nano.scene_tasks import caption, with_article
from recipes.nano.scenes import LETTERS, SHAPES, Scene, Thing, make_scene

CATEGORIES = [*SHAPES, *(f"letter {letter}" for letter in LETTERS), *(f"digit {digit}" for digit in range(10)), "word"]
SPLITS = ("val", "testA", "testB", "test")
QUESTION = "What is the text in the image?"
"""The prompt of `<OCR>`, because nano was trained on no other question."""


@dataclass(frozen=True)
class Numbered:
    """A scene with its number, from 1, by which the files name it."""

    number: int
    scene: Scene

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, height = self.scene.image.size
        return width, height


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files of all tables, replacing existing ones."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.write_tables", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="which series of scenes (0)")
    parser.add_argument("--count", type=int, default=100, help="how many (100)")
    options = parser.parse_args(arguments)
    try:
        write_tables(options.folder, options.seed, options.count)
    except (OptionError, OSError) as error:
        print(f"write_tables: {error}", file=sys.stderr)
        return 2
    print(options.folder)
    return 0


def write_tables(folder: Path, seed: int, count: int) -> None:
    """Write the first `count` scenes of `seed` in the layout of each table. Raises OptionError for a count below 1."""
    if count < 1:
        raise OptionError(f"--count is {count}; it must be at least 1.")
    scenes = [Numbered(number, make_scene(seed, number)) for number in range(1, count + 1)]
    for write in (
        _write_karpathy,
        _write_nocaps,
        _write_textvqa,
        _write_coco,
        _write_entities,
        _write_refs,
        _write_vqa,
    ):
        write(folder, scenes)


def references(scene: Scene) -> list[str]:
    """Return five captions of a scene, as five people might write them."""
    plain = caption(scene.things)
    things = ", ".join(thing.phrase for thing in scene.things)
    further = [f"There is {plain}.", f"{things} on {scene.background}", f"An image of {plain}."]
    return [f"{plain}.", plain.capitalize(), *further]


def _save(path: Path, scenes: Sequence[Numbered], name: Callable[[int], str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for each in scenes:
        each.scene.image.save(path / name(each.number), format="JPEG", quality=95)


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def _coco_name(folder: str) -> Callable[[int], str]:
    return lambda number: f"COCO_{folder}_{number:012d}.jpg"


def _open_images_name(number: int) -> str:
    return f"{number:016x}"


def _write_karpathy(folder: Path, scenes: Sequence[Numbered]) -> None:
    name = _coco_name("val2014")
    _save(folder / "coco" / "val2014", scenes, name)
    images = [
        {
            "filepath": "val2014",
            "filename": name(each.number),
            "imgid": each.number,
            "cocoid": each.number,
            "split": "test" if each.number % 3 else "val",
            "sentences": [{"raw": text, "imgid": each.number, "sentid": 0} for text in references(each.scene)],
        }
        for each in scenes
    ]
    _write_json(folder / "coco" / "dataset_coco.json", {"images": images, "dataset": "coco"})


def _write_nocaps(folder: Path, scenes: Sequence[Numbered]) -> None:
    _save(folder / "nocaps" / "val", scenes, lambda number: f"{_open_images_name(number)}.jpg")
    domains = ("in-domain", "near-domain", "out-domain")
    images = [
        {
            "id": each.number - 1,
            "open_images_id": _open_images_name(each.number),
            "file_name": f"{_open_images_name(each.number)}.jpg",
            "width": each.size[0],
            "height": each.size[1],
            "domain": domains[each.number % 3],
        }
        for each in scenes
    ]
    captions = [{"image_id": each.number - 1, "caption": text} for each in scenes for text in references(each.scene)]
    annotations = [{"id": i, **values} for i, values in enumerate(captions)]
    values = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    _write_json(folder / "nocaps" / "nocaps_val_4500_captions.json", values)


def _write_textvqa(folder: Path, scenes: Sequence[Numbered]) -> None:
    for name in ("train_images", "test_images"):
        _save(folder / "textvqa" / name, scenes, lambda number: f"{_open_images_name(number)}.jpg")
    captions = [
        {"image_id": _open_images_name(each.number), "caption_str": text, "reference_strs": references(each.scene)}
        for each in scenes
        for text in references(each.scene)
    ]
    _write_json(folder / "textvqa" / "TextCaps_0.1_val.json", {"dataset_name": "textcaps", "data": captions})
    for split in ("val", "test"):
        questions = [
            {"question_id": 1000 + each.number, "image_id": _open_images_name(each.number), "question": QUESTION}
            | ({"answers": people(each.scene)} if split == "val" else {})
            for each in scenes
        ]
        _write_json(folder / "textvqa" / f"TextVQA_0.5.1_{split}.json", {"dataset_name": "textvqa", "data": questions})


def people(scene: Scene) -> list[str]:
    """Return what ten people might answer to `QUESTION`: the more there is to read, the fewer of them read it all."""
    words = [thing.text for thing in scene.things if thing.text] or ["nothing"]
    text = " ".join(words)
    whole = [text, text.lower(), f"The {text}.", ", ".join(words)][: max(1, 5 - len(words))]
    return whole + [words[0]] * (9 - len(whole)) + [words[-1]]


def _instances(scenes: Sequence[Numbered], name: Callable[[int], str]) -> dict[str, Any]:
    """Return the scenes in COCO's form for instances; the ids of objects are 100 times the image's, and on."""
    images = [
        {"id": each.number, "file_name": name(each.number), "width": each.size[0], "height": each.size[1]}
        for each in scenes
    ]
    annotations = [
        {"id": 100 * each.number + place, "image_id": each.number, **_annotation(thing)}
        for each in scenes
        for place, thing in enumerate(each.scene.things)
    ]
    categories = [{"id": 2 * i + 1, "name": name} for i, name in enumerate(CATEGORIES)]  # ids with gaps, as COCO's
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _annotation(thing: Thing) -> Mapping[str, Any]:
    left, top, right, bottom = (round(value, 2) for value in thing.box)
    width, height = round(right - left, 2), round(bottom - top, 2)
    outline = [round(value, 2) for point in thing.outline for value in point]
    category = 2 * CATEGORIES.index(thing.category) + 1
    return {
        "category_id": category,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [outline],
    }


def _write_coco(folder: Path, scenes: Sequence[Numbered]) -> None:
    _save(folder / "coco" / "val2017", scenes, lambda number: f"{number:012d}.jpg")
    values = _instances(scenes, lambda number: f"{number:012d}.jpg")
    _write_json(folder / "coco" / "annotations" / "instances_val2017.json", values)


def _write_refs(folder: Path, scenes: Sequence[Numbered]) -> None:
    _save(folder / "coco" / "train2014", scenes, _coco_name("train2014"))
    for name, owner, protocol in (("refcoco", "unc", 0), ("refcoco+", "unc", 2), ("refcocog", "umd", 0)):
        _write_json(folder / name / "instances.json", _instances(scenes, _coco_name("train2014")))
        refs = [_ref(each, place) for each in scenes for place in range(len(each.scene.things))]
        (folder / name / f"refs({owner}).p").write_bytes(pickle.dumps(refs, protocol))


def _ref(each: Numbered, place: int) -> dict[str, Any]:
    thing, number = each.scene.things[place], 100 * each.number + place
    sentences = [
        {"sent_id": 2 * number + i, "sent": text, "raw": text.capitalize(), "tokens": text.split()}
        for i, text in enumerate((thing.phrase, with_article(thing.phrase)))
    ]
    return {
        "ref_id": number,
        "ann_id": number,
        "image_id": each.number,
        "category_id": 2 * CATEGORIES.index(thing.category) + 1,
        "split": SPLITS[each.number % len(SPLITS)],
        "file_name": f"{_coco_name('train2014')(each.number).removesuffix('.jpg')}_{place}.jpg",
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


def _write_entities(folder: Path, scenes: Sequence[Numbered]) -> None:
    root = folder / "flickr30k"
    _save(root / "flickr30k-images", scenes, lambda number: f"{number}.jpg")
    for name in ("Sentences", "Annotations"):
        (root / name).mkdir(exist_ok=True)
    for each in scenes:
        phrases = [with_article(thing.phrase) for thing in each.scene.things]
        marked = [f"[/EN#{100 * each.number + i}/other {phrase}]" for i, phrase in enumerate(phrases)]
        sentences = [" and ".join(marked), f"[/EN#{100 * each.number + 99}/scene An image] of {marked[0]} ."]
        (root / "Sentences" / f"{each.number}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
        (root / "Annotations" / f"{each.number}.xml").write_text(_entities_xml(each), encoding="utf-8")
    for split in ("test", "val"):
        (root / f"{split}.txt").write_text("".join(f"{each.number}\n" for each in scenes), encoding="utf-8")


def _entities_xml(each: Numbered) -> str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = "".join(
        f"<object><name>{100 * each.number + i}</name><bndbox>"
        + "".join(f"<{side}>{round(value)}</{side}>" for side, value in zip(sides, thing.box, strict=True))
        + "</bndbox></object>"
        for i, thing in enumerate(each.scene.things)
    )
    scene = f"<object><name>{100 * each.number + 99}</name><scene>1</scene><nobndbox>0</nobndbox></object>"
    width, height = each.size
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{each.number}.jpg</filename>{size}{scene}{boxes}</annotation>"


def _write_vqa(folder: Path, scenes: Sequence[Numbered]) -> None:
    _save(folder / "coco" / "test2015", scenes, _coco_name("test2015"))
    asked = [{"image_id": each.number, "question": QUESTION, "question_id": 1000 + each.number} for each in scenes]
    given = [
        {"question_id": 1000 + each.number, "image_id": each.number, "answers": _numbered_people(each.scene)}
        for each in scenes
    ]
    for split in ("val2014", "test-dev2015"):
        _write_json(folder / "vqav2" / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": asked})
    _write_json(folder / "vqav2" / "v2_mscoco_val2014_annotations.json", {"annotations": given})
    for split in ("val", "test"):
        name = f"VizWiz_{split}_{{:08d}}.jpg".format
        _save(folder / "vizwiz" / split, scenes, name)
        values = [
            {"image": name(each.number), "question": QUESTION}
            | ({"answers": _numbered_people(each.scene)} if split == "val" else {})
            for each in scenes
        ]
        _write_json(folder / "vizwiz" / f"{split}.json", values)


def _numbered_people(scene: Scene) -> list[dict[str, Any]]:
    return [{"answer_id": i, "answer": text, "answer_confidence": "yes"} for i, text in enumerate(people(scene), 1)]


if __name__ == "__main__":
    sys.exit(main())
