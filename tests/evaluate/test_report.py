"""The report as JSON and Markdown."""

import json
from pathlib import Path

from florence2.evaluate.report import Report, Result

RESULT = Result("refcoco:val", "accuracy", 52.04, 53.9, (51.0, 53.04), 10834, 1500, 2, "ovd", "the first box")
ALONE = Result("refcoco-res:val", "oIoU", 31.0, None, None, 10834, 1500, 0, "res", "filled")
COMPUTED = {"model": "large", "revision": None, "weights": "abc", "beams": 3}


def test_markdown() -> None:
    text = Report([RESULT, ALONE], COMPUTED, "large", ["One label was unknown."]).to_markdown()
    assert "| refcoco:val | accuracy | 52.0 | 53.9 | -1.9 | 51.0 to 53.0 | 10,834 | 1,500 | 2 | ovd |" in text
    assert "| refcoco-res:val | oIoU | 31.0 |  |  |  | 10,834 | 1,500 | 0 | res |" in text
    assert "- weights: abc\n- beams: 3\n" in text
    assert "revision" not in text
    assert "- ovd: the first box" in text
    assert "- One label was unknown." in text
    assert "replaced in December 2024" in text
    assert "published" in text.splitlines()[0]


def test_files(tmp_path: Path) -> None:
    report = Report([RESULT, ALONE], COMPUTED)
    report.write(tmp_path)
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["results"][0]["difference"] == 52.04 - 53.9
    assert values["results"][1]["difference"] is None
    assert values["computed"] == COMPUTED
    assert values["notes"] == []
    assert (tmp_path / "report.md").read_text() == report.to_markdown()
