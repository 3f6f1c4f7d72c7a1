"""An export of nano, and what nano itself answers about images of its own size, which no client resizes."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from florence2 import Florence2
from recipes.nano.scenes import make_scene
from tests.export.conftest import exported as exported
from tests.export.conftest import nano as nano

TASKS = (
    *("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>", "<OD>", "<DENSE_REGION_CAPTION>"),
    *("<REGION_PROPOSAL>", "<OCR>", "<OCR_WITH_REGION>", "<CAPTION_TO_PHRASE_GROUNDING>a red circle"),
)
Ids = dict[str, list[tuple[int, ...]]]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five scenes as PNG files."""
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{index}.png" for index in range(5)]
    for index, file in enumerate(files):
        make_scene(18, index).image.resize((192, 192)).save(file)
    return files


@pytest.fixture(scope="session")
def greedy(nano: Florence2, images: Sequence[Path]) -> Ids:
    """The ids of greedy answers by task, one for each image."""
    return {
        task: [tuple(nano.run(task, image, num_beams=1, confidence=False).token_ids) for image in images]
        for task in TASKS
    }
