"""The tools, asked by the official SDK's own client over stdin and stdout of a real process."""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import florence2
from florence2.cli.main import main
from florence2.errors import ImageError
from florence2.mcp.roots import find_image
from recipes.nano.scenes import make_scene

if TYPE_CHECKING:  # two seconds at collection
    from mcp import ClientSession

Talk = Callable[["ClientSession"], Coroutine[Any, Any, None]]


def talk_to(root: Path, talk: Talk) -> None:
    """Start the command with nano, initialize, and let `talk` ask."""
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    command = ["-m", "florence2", "mcp", "--model", "nano", "--device", "cpu", "--root", str(root)]
    process = StdioServerParameters(command=sys.executable, args=command, env=dict(os.environ), cwd=root)

    async def run() -> None:
        async with stdio_client(process) as (read, write), ClientSession(read, write) as session:
            await session.initialize()
            await talk(session)

    asyncio.run(asyncio.wait_for(run(), 120))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    make_scene(5, 0).image.save(tmp_path / "images" / "scene.png")
    make_scene(5, 1).image.save(tmp_path / "secret.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "text.png").write_text("not an image")
    return tmp_path / "images"


def test_the_three_tools_answer_as_the_library_does_and_read_below_the_roots_alone(root: Path) -> None:
    f, scene = florence2.load("nano", device="cpu"), root / "scene.png"
    box = f.detect(scene).boxes[0]
    expected: dict[tuple[Any, ...], florence2.Answer] = {
        ("describe",): f.caption(scene, "detailed"),
        ("describe", "detail", "short"): f.caption(scene),
        ("describe", "box", box.xyxy): f.describe(scene, box.xyxy),
        ("find",): f.detect(scene),
        ("find", "things", box.label): f.ground(scene, box.label),
        ("read",): f.ocr(scene),
        ("read", "regions", True): f.ocr(scene, regions=True),
    }

    async def talk(session: "ClientSession") -> None:
        tools = (await session.list_tools()).tools
        assert [tool.name for tool in tools] == ["describe", "find", "read"]
        assert all(str(root) in (tool.description or "") and tool.annotations.read_only_hint for tool in tools)
        for (name, *given), answer in expected.items():
            arguments = {"image": "scene.png", **dict([given] if given else [])}
            result = await session.call_tool(name, arguments)
            assert not result.is_error, result.content
            values = result.structured_content
            assert values["summary"] == str(answer) and json.loads(result.content[0].text) == values
            same = json.loads(answer.to_json())
            assert {key: values[key] for key in ("task", "text", "finish_reason")} == {
                key: same[key] for key in ("task", "text", "finish_reason")
            }
            for kind in ("boxes", "quads"):
                for one, other in zip(values.get(kind, []), same.get(kind, []), strict=True):
                    assert one["label"] == other["label"]
                    assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4)

        await read_elsewhere(session, root)

    talk_to(root, talk)


async def read_elsewhere(session: "ClientSession", root: Path) -> None:
    """Nothing says whether a file outside exists, and a wrong call is a sentence, after which the next is answered."""
    outside = ["../secret.png", str(root.parent / "secret.png"), "link.png", "/etc/hostname", "missing.png", "a\0b"]
    for path in [*outside, "https://example.com/a.png", "x" * 5000]:
        result = await session.call_tool("find", {"image": path})
        assert result.is_error and "is not a file below the folders" in result.content[0].text, path
        assert len(result.content[0].text) < 1000
    for arguments, sentence in [
        ({"image": "text.png"}, "text.png"),
        ({"image": "."}, "is a folder"),
        ({"image": "scene.png", "things": ""}, "needs a text"),
        ({"image": "scene.png", "things": "word " * 2000}, "positions"),
    ]:
        result = await session.call_tool("find", arguments)
        assert result.is_error and "Traceback" not in result.content[0].text
        assert sentence in result.content[0].text, result.content[0].text
    wrong = await session.call_tool("read", {"image": "scene.png", "box": [30, 20, 10, 5], "regions": True})
    assert wrong.is_error
    assert not (await session.call_tool("read", {"image": str(root / "scene.png")})).is_error


def test_a_root_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for root in ("missing", "file"):
        assert main(["mcp", "--model", "nano", "--root", str(tmp_path / root)]) == 2
        assert "is not a folder; name an existing one." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["mcp", "--model", "nano"])


def test_a_path_is_looked_for_in_every_root(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "two.png").write_bytes(b"2")
    roots = (root.resolve(), other.resolve())
    assert find_image("two.png", roots) == other.resolve() / "two.png"
    assert find_image("../other/two.png", roots) == other.resolve() / "two.png"
    os.mkfifo(root / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        find_image("pipe.png", roots)
    with pytest.raises(ImageError, match="is not a file below"):
        find_image("two.png", roots[:1])
