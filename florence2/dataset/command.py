"""`florence2 dataset OUT --to FORMAT --out DIR`: write the rows of a run in the formats of other tools."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from florence2.cli.main import EXIT_INCOMPLETE, parse_words
from florence2.cli.options.arguments import say
from florence2.cli.options.groups import add_min_confidence
from florence2.cli.options.values import path_argument
from florence2.cli.progress import Progress
from florence2.dataset.captions import check_ending
from florence2.dataset.classes import read_classes
from florence2.dataset.images import LINKS
from florence2.dataset.splits import EXAMPLE, parse_split
from florence2.dataset.views import RegionView, ViewSettings
from florence2.dataset.writing import VIEWS, write_views
from florence2.errors import OptionError, shown

_REGIONS = tuple(name for name, view in VIEWS.items() if issubclass(view, RegionView))
_YOLO = ("yolo", "yolo-seg", "yolo-obb")
_ONLY_FOR = {
    "classes": _REGIONS,
    "unmatched": _REGIONS,
    "min_confidence": (*_REGIONS, "csv"),
    "link": (*_YOLO, "metadata"),
    "prefix": ("captions", "metadata", "coco-captions"),
    "suffix": ("captions", "metadata", "coco-captions"),
    "ext": ("captions",),
    "beside": ("captions",),
    "overwrite": ("captions",),
    "with_images": ("webdataset",),
    "images": (*_YOLO, "metadata", "captions", "webdataset"),
}
"""The views in which an option has an effect."""


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 dataset",
        description="Write the answers in the output folder of `florence2 label` or `florence2 run` as a dataset for "
        "other tools, without a model, as often as you like. Each format gets a folder of its own in --out, and "
        "report.json says what was clipped, left out or not matched.",
        epilog=f"Example: florence2 dataset answers --to coco,yolo --out dataset --split {EXAMPLE}",
    )
    parser.add_argument("source", type=path_argument, metavar="OUT", help="the output folder of label or run")
    parser.add_argument(
        "--to", required=True, metavar="FORMAT,...", help=f"one or more of {', '.join(VIEWS)}, with commas between"
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="the folder for the dataset; --to captions --beside needs none (its report is then in OUT/dataset)",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        help="show only the rows of this task, such as od; repeatable (default: the only task that fits)",
    )
    _add_regions(parser)
    _add_captions(parser)
    parser.add_argument(
        "--split",
        metavar="NAME=SHARE,...",
        help=f"parts of the dataset, such as {EXAMPLE}; the part of an image depends on its id alone (default: one)",
    )
    parser.add_argument(
        "--link",
        choices=LINKS,
        help="how images come into yolo and metadata: symbolic links, hard links or copies (default: symlink)",
    )
    parser.add_argument(
        "--images",
        type=path_argument,
        metavar="DIR",
        help="the folder that was labelled, where it is now: images that are not at their old places are looked for "
        "there by their ids",
    )
    return parser


def _add_regions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes",
        type=path_argument,
        metavar="FILE",
        help="the names of the classes, one a line, in the order of their numbers; a label matches exactly, else "
        "without regard to case and white space, else as a plural (default: every label is a class)",
    )
    parser.add_argument(
        "--unmatched",
        choices=("keep", "drop", "error"),
        help="of a label that fits no class of --classes: keep it as a further class, drop the region, or end with "
        "an error (default: keep); report.json lists all such labels",
    )
    add_min_confidence(parser)


def _add_captions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefix", metavar="TEXT", help='a text before every caption, such as "ohwx, "')
    parser.add_argument("--suffix", metavar="TEXT", help="a text after every caption")
    parser.add_argument("--ext", metavar=".EXT", help="the ending of caption files (default: .txt)")
    parser.add_argument(
        "--beside",
        action="store_true",
        default=None,
        help="write caption files next to the images, a.txt next to a.jpg; existing files stay",
    )
    parser.add_argument("--overwrite", action="store_true", default=None, help="of --beside: replace existing files")
    parser.add_argument(
        "--with-images", action="store_true", default=None, help="put the images into the tars of webdataset too"
    )


def main(arguments: Sequence[str]) -> int:
    """Write the dataset; what a user must know goes to stderr.

    Returns:
        1 if something that the rows hold could not be written, such as an image that is not at its place; otherwise 0.

    Raises:
        Florence2Error: A word of the command line, the folder of rows, or the output folder cannot be used.
        OSError: A file cannot be read or written.
    """
    options = parse_words(build_parser(), arguments)
    views = _read_views(options.to)
    settings = _read_settings(options, views)
    out = _out_folder(options, views)
    with Progress() as progress:
        summary = write_views(options.source, views, out, tasks=options.task, settings=settings, progress=progress)
    for note in summary.notes:
        say(f"florence2: {note}")
    return 0 if summary.complete else EXIT_INCOMPLETE


def _read_views(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in VIEWS]:
        raise OptionError(f"Unknown format {shown(unknown[0])} in --to. Known formats: {', '.join(VIEWS)}.")
    return names


def _out_folder(options: argparse.Namespace, views: Sequence[str]) -> Path:
    if options.out is None and not (views == ["captions"] and options.beside):
        raise OptionError("Where to? Give --out DIR, the folder for the dataset.")
    return Path(options.source / "dataset" if options.out is None else options.out)


def _read_settings(options: argparse.Namespace, views: Sequence[str]) -> ViewSettings:
    given = {name: getattr(options, name) for name in _ONLY_FOR if getattr(options, name) is not None}
    for name in given:
        if not set(_ONLY_FOR[name]) & set(views):
            raise OptionError(
                f"--{name.replace('_', '-')} has no effect on --to {','.join(views)}; it is for "
                f"{', '.join(_ONLY_FOR[name])}."
            )
    if "unmatched" in given and "classes" not in given:
        raise OptionError("--unmatched needs --classes FILE, the classes that labels are matched to.")
    if "overwrite" in given and "beside" not in given:
        raise OptionError("--overwrite needs --beside; files in --out are always written again.")
    if "ext" in given:
        check_ending(given["ext"])
    if "classes" in given:
        given["classes"] = read_classes(Path(given["classes"]))
    if "images" in given and not Path(given["images"]).is_dir():
        raise OptionError(
            f"--images is {shown(str(given['images']))}, which is not a folder; give the one with the images."
        )
    split = {} if options.split is None else parse_split(options.split)
    return ViewSettings(**given, split=split)
