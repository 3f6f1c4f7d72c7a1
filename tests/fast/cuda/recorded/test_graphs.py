"""What is recorded, how long it is valid, and how much of it is kept."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from florence2.fast.cuda.recorded import graphs
from florence2.fast.cuda.recorded.graphs import (
    DECODER,
    ENCODER,
    VISION,
    Recorded,
    Recordings,
    StageWatch,
    record_with,
    recorder_for,
    recordings,
    round_up,
    watch,
    why_not_recorded,
)
from florence2.fast.install import install
from florence2.model.florence2 import Florence2Model
from parity.cases import shapes
from parity.recipe import make_model
from parity.tape import NotRecordableError, TapeRecorder
from tests.release import keep

PARTS = {"vision": VISION, "encoder": ENCODER, "decoder": DECODER}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made() -> Florence2Model:
    shape = shapes()[3]
    return install(make_model(shape.config, shape.seed, shape.end_bonus))


@pytest.fixture
def model(made: Florence2Model) -> Florence2Model:
    return copy.deepcopy(made)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_everything_of_an_installed_model_may_be_recorded(model: Florence2Model, part: graphs.Part) -> None:
    assert why_not_recorded(model, part) is None
    assert watch(model, part) is watch(model, part)


def _double(module: Any) -> None:
    module.weight.data = module.weight.data * 2


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook": lambda module: module.register_forward_hook(lambda *_: None),
    "pre-hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "training": lambda module: module.train(),
    "method": lambda module: setattr(module, "forward", lambda x: x),
    "weight": _double,
    "parameter": lambda module: setattr(module, "weight", nn.Parameter(module.weight * 2)),
    "layout": lambda module: setattr(module.weight, "data", module.weight.data.t().contiguous().t()),
    "class": lambda module: setattr(module, "__class__", type("Own", (type(module),), {})),
    "tensor": lambda module: setattr(module, "loose", torch.ones(1)),
}
PLACES: dict[str, Callable[[Any], Any]] = {
    "vision": lambda model: model.vision_tower.blocks[0][0].spatial_block.ffn.fc1,
    "encoder": lambda model: model.language_model.encoder.layers[0].fc1,
    "decoder": lambda model: model.language_model.decoder.layers[0].fc1,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", PARTS)
def test_a_change_is_seen_in_its_part_alone(model: Florence2Model, name: str, change: str) -> None:
    before = {each: watch(model, part) for each, part in PARTS.items()}
    CHANGES[change](PLACES[name](model))
    for each, part in PARTS.items():
        same = watch(model, part) is before[each]
        assert same == (each != name)
    now = watch(model, PARTS[name])
    assert (now.reason is None) == (change in ("weight", "parameter", "layout"))
    assert now.reason is not None or now.key != before[name].key


def test_values_written_in_place_are_no_change(model: Florence2Model) -> None:
    before = watch(model, DECODER)
    model.language_model.decoder.layers[0].fc1.weight.mul_(2)
    assert watch(model, DECODER) is before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.language_model.decoder, "scale", 3.0),
        lambda model: model.untie_head(),
        lambda model: model.untie_answers(),
        lambda model: setattr(
            model.language_model.decoder, "layers", nn.ModuleList(model.language_model.decoder.layers).eval()
        ),
        lambda model: setattr(model, "final_logits_bias", model.final_logits_bias + 1),
    ],
    ids=["number", "head", "answers", "list", "bias"],
)
def test_other_numbers_and_modules_have_another_key(model: Florence2Model, change: Callable[[Any], object]) -> None:
    before = watch(model, DECODER)
    change(model)
    now = watch(model, DECODER)
    assert now is not before and now.reason is None and now.key != before.key


def test_a_value_that_comes_back_to_an_old_place_is_seen(model: Florence2Model) -> None:
    """Numbers that were freed leave their ids to later ones; those that a watch has seen stay."""
    decoder: Any = model.language_model.decoder
    before = watch(model, DECODER)
    for i in range(50):
        decoder.scale = 1.5 + i
        now = watch(model, DECODER)
        assert now is not before and now.key != before.key
        before = now


@pytest.mark.parametrize("name", ["step", "logits", "start_cache"])
def test_replaced_methods_of_the_model(model: Florence2Model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = watch(model, DECODER)
    monkeypatch.setattr(model, name, getattr(model, name))
    assert watch(model, DECODER) is not before
    assert why_not_recorded(model) == f"the model has a replaced method, {name}"


@pytest.mark.parametrize(
    "name", keep([0], ["florence2.model.florence2.Florence2Model", "florence2.fast.install.FastFlorence2Model"])
)
def test_methods_replaced_before_the_first_answer(name: str) -> None:
    """In a process of its own, where nobody has looked at the classes yet."""
    script = f"""
import importlib, torch
from florence2.checkpoints.hub import EMBEDDED_MODEL
from florence2.fast.cuda.recorded.graphs import DECODER, watch
from florence2.loading import load
owner = getattr(importlib.import_module("{name.rpartition(".")[0]}"), "{name.rpartition(".")[2]}")
step = owner.step
owner.step = lambda *given: step(*given)
with torch.inference_mode():
    print(watch(load(EMBEDDED_MODEL, device="cpu").model, DECODER).reason)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{name.rpartition('.')[2]}.step was replaced"


def test_hooks_on_all_modules_and_modes(model: Florence2Model) -> None:
    before = watch(model, DECODER)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert watch(model, DECODER).reason == "a forward hook is registered on all modules"
    finally:
        handle.remove()
    with torch.inference_mode(False), torch.enable_grad():
        assert watch(model, DECODER).reason == "gradients are on"
    assert watch(model, DECODER).key == before.key


def test_a_watch_does_not_keep_its_model(made: Florence2Model) -> None:
    import weakref

    model = copy.deepcopy(made)
    watch(model, DECODER)
    gone = weakref.ref(model)
    del model
    assert gone() is None


class Doubling(Recorded):
    def __init__(self, record: Any, size: int = 4):
        super().__init__(record, CPU)
        self.value = torch.ones(size)

    def tensors(self) -> Iterator[Tensor]:
        yield self.value


def test_work_is_done_plainly_then_recorded_then_replayed() -> None:
    recorder = TapeRecorder()
    stage, calls = Doubling(recorder), []

    def work() -> None:
        calls.append(1)
        stage.value.mul_(2)

    for n in range(1, 6):
        stage.do("kind", work)
        assert stage.value.tolist() == [2.0**n] * 4
    assert len(calls) == 2 and (recorder.recorded, recorder.replayed) == (1, 4)
    stage.do("another", work)
    assert len(calls) == 3
    stage.forget()
    stage.do("kind", work)
    assert len(calls) == 4


def test_one_call_has_a_recording_at_a_time() -> None:
    kept, record = Recordings(), TapeRecorder()
    first = kept.take("a", lambda: Doubling(record))
    second = kept.take("a", lambda: Doubling(record))
    assert first is not second
    kept.give("a", first, CPU)
    kept.give("a", second, CPU)
    assert kept.take("b", lambda: Doubling(record)) not in (first, second)
    assert kept.take("a", lambda: Doubling(record)) is second and len(kept) == 1


def test_those_not_used_for_longest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Recordings()
    monkeypatch.setattr(graphs, "_KEPT", 2)
    stages = [Doubling(TapeRecorder()) for _ in range(3)]
    for i, stage in enumerate(stages):
        kept.give(i, stage, CPU)
    assert len(kept) == 2 and kept.take(2, lambda: stages[0]) is stages[2]
    assert kept.take(0, lambda: Doubling(TapeRecorder())) is not stages[0]


def test_bytes_of_buffers_and_recordings_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_KEPT_BYTES", 3000)
    kept, stages = Recordings(), []
    for i in range(3):
        stage = Doubling(TapeRecorder(size=500), size=125)  # 500 bytes
        for _ in range(2):
            stage.do("kind", lambda stage=stage: stage.value.mul_(2))
        assert stage.size == 1000
        stages.append(stage)
        kept.give(i, stage, CPU)
    assert len(kept) == 3
    kept.give("small", Doubling(TapeRecorder(), 1), CPU)
    assert len(kept) == 3 and kept.take(0, lambda: stages[1]) is stages[1]
    kept.give("large", Doubling(TapeRecorder(), 2000), CPU)
    assert len(kept) == 1  # the newest, or every call would record it again


def test_memory_that_is_needed_is_not_kept() -> None:
    kept, tries = Recordings(), []
    kept.give("old", Doubling(TapeRecorder()), CPU)

    def make() -> Doubling:
        tries.append(len(kept))
        if len(kept):
            raise torch.OutOfMemoryError("of the device")
        return Doubling(TapeRecorder())

    kept.take("new", make)
    assert tries == [1, 0]


def test_recordings_are_of_one_model(model: Florence2Model, made: Florence2Model) -> None:
    assert recordings(model) is recordings(model) and recordings(model) is not recordings(made)


def test_only_cuda_records_by_itself() -> None:
    assert recorder_for(CPU) is None and recorder_for(torch.device("cuda")) is graphs.record_cuda_graph
    recorder = TapeRecorder()
    with record_with(recorder):
        assert recorder_for(CPU) is recorder
        with record_with(None):
            assert recorder_for(CPU) is recorder_for(torch.device("cuda")) is None
        assert recorder_for(CPU) is recorder
    assert recorder_for(CPU) is None


def test_round_up() -> None:
    assert [round_up(n, (1, 2, 4)) for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 12]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0]) + x,
        lambda x: bool((x > 0).all()),
        lambda x: x.long().unique(),
    ],
)
def test_a_tape_refuses_what_a_graph_cannot_hold(work: Callable[[Tensor], object]) -> None:
    x = torch.ones(3)
    with pytest.raises(NotRecordableError):
        TapeRecorder()(lambda: work(x) and None, CPU)


def test_a_tape_knows_nothing_of_python() -> None:
    x, other, factor = torch.ones(2), torch.full((2,), 5.0), [2.0]

    def work() -> None:
        view = x[:1]
        view.mul_(factor[0])
        x.add_(other * 10)

    tape = TapeRecorder()(work, CPU)
    assert x.tolist() == [1, 1]  # what was recorded is undone
    tape()
    assert x.tolist() == [52, 51]
    factor[0] = 100
    other.fill_(1)
    tape()
    assert x.tolist() == [114, 61]
    other.data = torch.zeros(2)
    tape()
    assert x.tolist() == [238, 71]


def test_watches_of_models_without_a_language_model(model: Florence2Model) -> None:
    text: Any = model
    text.language_model = nn.Identity()
    assert StageWatch(model, VISION).reason is None
    assert "Identity" in str(StageWatch(model, DECODER).reason) and "Identity" in str(StageWatch(model, ENCODER).reason)


def test_what_cannot_be_recorded_is_done_plainly_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_failures", [])
    tries: list[int] = []

    def fail(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        tries.append(1)
        raise graphs.RecordingError("out of memory")

    stage = Doubling(fail, 1)
    stage.value.fill_(1.0)
    stage.do("kind", lambda: stage.value.mul_(2))
    with pytest.warns(RuntimeWarning, match="not used any more in this process: out of memory"):
        stage.do("kind", lambda: stage.value.mul_(2))
    assert stage.value.item() == 4.0 and len(tries) == 1  # a recording executes nothing, so it was done once each time
    assert graphs.recorder_for(torch.device("cuda")) is None


def test_each_thread_does_the_work_plainly_before_it_records(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = TapeRecorder()
    stage = Doubling(recorder, 1)
    stage.do("kind", lambda: stage.value.mul_(2))
    for recorded in (0, 1):
        monkeypatch.setattr("florence2.fast.cuda.recorded.graphs.threading.get_ident", lambda: 12345)
        stage.do("kind", lambda: stage.value.mul_(2))
        assert recorder.recorded == recorded
