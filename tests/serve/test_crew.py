"""Several devices, each in a process of its own: the same answers, and none lost when a process dies."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import florence2
from florence2.asking.requests import PreparedImage, check_request
from florence2.cli.main import main
from florence2.serve.command import build_parser, loaders
from florence2.serve.errors import RequestError
from florence2.serve.service import Service
from florence2.serve.settings import Settings
from florence2.serve.work.jobs import Answered, HeldImage, Job
from tests.serve.agreement import disagreements
from tests.serve.server import RunningServer, chat_body, native_body, png, processes_of, serving


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("pair"), "--devices", "cpu,cpu") as running:
        yield running
        assert running.stop() == 0


@pytest.mark.release  # two processes
def test_answers_are_those_of_the_library(pair: RunningServer, nano: florence2.Florence2) -> None:
    assert disagreements(pair, nano, 12, 6, 2, 3) == []
    assert pair.metric("workers") == 2 and pair.metric("batch_rows_count") > 0
    assert pair.call("GET", "/version").json["weights_sha256"]


def test_an_image_is_asked_about_by_its_hash_where_it_is(pair: RunningServer) -> None:
    data = png(7001)
    assert pair.post("/v1/florence2", native_body(data, "od")).status == 200
    image = {"sha256": hashlib.sha256(data).hexdigest()}
    replies = [pair.post("/v1/florence2", {"image": image, "tasks": [{"task": "caption"}]}) for _ in range(4)]
    assert [reply.json["picture"]["cached"] for reply in replies] == [True] * 4
    unknown = pair.post("/v1/florence2", {"image": {"sha256": "0" * 64}, "tasks": [{"task": "caption"}]})
    assert unknown.code == "picture_not_cached"


def test_cascades_and_streams(pair: RunningServer, nano: florence2.Florence2, image: bytes) -> None:
    got = pair.post("/v1/florence2", native_body(image, "cascade")).json["answers"][0]
    right = nano.cascade(image)
    assert got["caption"]["text"] == right.caption.text and len(got["segments"]) == len(right.segments)
    body = chat_body("<CAPTION>", image, stream=True, florence2={"num_beams": 1})
    reply = pair.post("/v1/chat/completions", body).body.decode()
    assert reply.count("data: ") > 4 and reply.rstrip().endswith("data: [DONE]")


def test_errors_come_through(pair: RunningServer) -> None:
    assert pair.chat("<OD>", b"not an image").code == "invalid_image"
    late = pair.post("/v1/chat/completions", chat_body("<OD>", png(7100)), {"x-request-timeout-ms": "1", **_JSON})
    assert late.code == "deadline_exceeded"


_JSON = {"content-type": "application/json"}


def test_no_request_is_lost_when_a_process_dies(pair: RunningServer) -> None:
    bodies = [chat_body("<CAPTION>", png(7200 + i), florence2={"num_beams": 1}) for i in range(16)]
    restarts, queries = pair.metric("worker_restarts_total"), pair.metric("picture_cache_queries_total")
    with ThreadPoolExecutor(8) as threads:
        replies = [threads.submit(pair.post, "/v1/chat/completions", body) for body in bodies]
        while pair.metric("picture_cache_queries_total") < queries + 5:
            time.sleep(0.01)
        os.kill(processes_of(pair)[0], signal.SIGKILL)
        assert [reply.result().status for reply in replies] == [200] * 16
    pair.wait_for("worker_restarts_total", restarts + 1)
    pair.wait_for("workers", 2, seconds=30)
    pair.wait_for("requests_running", 0)


def test_clients_that_leave_free_their_places(pair: RunningServer) -> None:
    for i in range(6):
        with pytest.raises(TimeoutError):
            pair.post("/v1/chat/completions", chat_body("<OD>", png(7300 + i)), timeout=0.05)
    pair.wait_for("requests_running", 0)
    pair.wait_for("queue_bytes", 0)


# ---- without HTTP --------------------------------------------------------------------------------------------------


def load_deadly() -> florence2.Florence2:
    """A model whose process dies with an image of 13 x 13 pixels."""
    model = florence2.load("nano", device="cpu")
    prepare = model.prepare_image

    def deadly(image: Any, *rest: Any) -> PreparedImage:
        prepared = prepare(image, *rest)
        if prepared.size == (13, 13):
            os._exit(3)
        return prepared

    setattr(model, "prepare_image", deadly)  # noqa: B010  mypy does not let a method be assigned
    return model


def answer(service: Service, data: bytes) -> Answered:
    question = check_request(("<CAPTION>", b""))
    held = service.hold(data, hashlib.sha256(data).hexdigest(), "me")
    job = Job(question, held, florence2.GenerationOptions(max_new_tokens=4, num_beams=1), time.monotonic() + 60)
    return service.submit([job])[0].result(60)


def until(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service([("a", load_deadly)], Settings())
    service.worker.start()
    until(lambda: service.worker.model)
    yield service
    service.worker.stop()


@pytest.mark.release  # a process that dies twice
def test_a_request_that_kills_two_processes_fails(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    assert answer(service, png(1)).image_tokens > 0
    with pytest.raises(RequestError, match="died twice") as error:
        answer(service, png(2, 13, 13))
    assert (error.value.status, error.value.code) == (503, "worker_lost")
    until(lambda: service.worker.model)
    with pytest.raises(RequestError, match="not kept"):  # the process that had it is gone
        service.submit([Job(None, HeldImage("x"), florence2.GenerationOptions(), time.monotonic() + 60)])[0].result(60)
    assert answer(service, png(1)).answer is not None
    assert "the process of a died (exit code 3)" in capfd.readouterr().err


@pytest.mark.release
def test_jobs_fail_when_the_drain_is_over(service: Service) -> None:
    options = florence2.GenerationOptions(max_new_tokens=1000, min_new_tokens=1000, num_beams=1)
    held = service.hold(png(3), "3", "me")
    future = service.submit([Job(check_request(("<OD>", b"")), held, options, time.monotonic() + 60)])[0]
    until(lambda: service.queue.running)
    service.drain()
    service.give_up()
    with pytest.raises(RequestError, match="stopping"):
        future.result(10)
    until(lambda: service.is_drained)


def test_devices_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    named = loaders(build_parser().parse_args(["--devices", "cuda:0, cuda:1"]))
    assert isinstance(named, list)
    assert [name for name, _ in named] == ["cuda:0 (1)", "cuda:1 (2)"]
    assert main(["serve", "--devices", "cpu,cpu", "--device", "cpu"]) == 2
    assert "leave one out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "--devices", "cpu,"])
    assert "'cpu,' is not a list of devices" in capsys.readouterr().err


@pytest.mark.release
def test_a_device_that_does_not_exist_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the other device is doing."""
    assert main(["serve", "--model", "nano", "--port", "0", "--devices", "cpu,cuda:9"]) == 2
    words = capfd.readouterr().err
    assert "Traceback" not in words and "cuda" in words.splitlines()[-1]
