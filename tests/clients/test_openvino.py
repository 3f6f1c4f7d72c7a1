"""The graphs in OpenVINO in greedy search, with the decoder in one graph, and in two, as `--unmerged` writes it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from florence2 import Florence2
from florence2.lite.layout import EMBED, ENCODER, FIRST, MERGED, STEP, USE_CACHE, VISION, cache_names, graph_file
from tests.clients.conftest import TASKS, Ids

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[clients]'")
Values = dict[str, np.ndarray]


class Client:
    """Greedy search without any of this package's code."""

    def __init__(self, folder: Path, decoder: Sequence[str]):
        core, names = openvino.Core(), (VISION, EMBED, ENCODER, *decoder)
        self.first, self.later = decoder[0], decoder[-1]
        # On processors that have bfloat16, OpenVINO would compute in it: other answers, and OpenVINO 2026.4 then fails
        # in the merged decoder.
        precise = {"INFERENCE_PRECISION_HINT": "f32"}
        self.graphs = {name: core.compile_model(folder / graph_file(name), "CPU", precise) for name in names}

    def run(self, graph: str, **feeds: np.ndarray) -> Values:
        compiled = self.graphs[graph]
        # a port has several names where a value passes through, one of them that of the graph
        given = {name: feeds[name] for port in compiled.inputs for name in port.names if name in feeds}
        return {name: value for port, value in compiled(given).items() for name in port.names}

    def answer(self, pixels: np.ndarray, prompt: Sequence[int], start: Sequence[int], end: int) -> tuple[int, ...]:
        """Write ids after `start`, all but the first of which are forced, until the end id."""
        image = self.run(VISION, pixel_values=pixels)["image_features"]
        text = self.run(EMBED, input_ids=np.array([prompt]))["inputs_embeds"]
        both = np.concatenate([image, text], axis=1)
        mask = np.ones(both.shape[:2], np.int64)
        memory = self.run(ENCODER, attention_mask=mask, inputs_embeds=both)["last_hidden_state"]
        feeds = {"encoder_attention_mask": mask, "encoder_hidden_states": memory}
        for source in ("decoder", "encoder"):
            feeds |= dict.fromkeys(cache_names("past_key_values", source, 3), np.zeros((1, 5, 0, 32), np.float32))
        ids = [start[0]]
        while len(ids) == 1 or ids[-1] != end:
            embeddings = self.run(EMBED, input_ids=np.array([ids[-1:]]))["inputs_embeds"]
            graph, started = (self.first, False) if len(ids) == 1 else (self.later, True)
            out = self.run(graph, **feeds, inputs_embeds=embeddings, **{USE_CACHE: np.array([started])})
            feeds |= {
                name.replace("present", "past_key_values"): value
                for name, value in out.items()
                if name.startswith("present") and value.shape[2]
            }
            ids.append(start[len(ids)] if len(ids) < len(start) else int(out["logits"][0, -1].argmax()))
        return tuple(ids)


@pytest.mark.parametrize("decoder", [(FIRST, STEP), (MERGED,)], ids=["unmerged", "merged"])
def test_greedy_answers_are_those_of_torch(
    decoder: Sequence[str], nano: Florence2, exported: Path, images: Sequence[Path], greedy: Ids
) -> None:
    client = Client(exported, decoder)
    for task in TASKS:
        prompt = nano.processor.prompt(task)
        assert [client.answer(nano.processor.image_array(image), prompt, (2, 0), 2) for image in images] == greedy[task]


def test_the_block_of_the_guide(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "base").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/onnx.md", "exec"), names)
    assert names["decoder"].outputs
