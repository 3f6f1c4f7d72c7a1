"""The queue, the cache and the worker, without HTTP."""

import io
import time
from collections.abc import Iterator
from typing import Any

import pytest

import florence2
from florence2.asking.requests import EncodedImage
from florence2.generation.engine.features import FeatureCache
from florence2.serve.app import create_app
from florence2.serve.errors import RequestError
from florence2.serve.incoming.log import RequestLog
from florence2.serve.service import Service
from florence2.serve.settings import Settings
from florence2.serve.work.jobs import HeldImage, Job
from florence2.serve.work.queue import JobQueue
from florence2.serve.work.worker import Worker
from tests.serve.asgi import call
from tests.serve.server import chat_body

OPTIONS = florence2.GenerationOptions()


def job(image: HeldImage, seconds: float = 60) -> Job:
    return Job(None, image, OPTIONS, time.monotonic() + seconds)


def queue(**settings: Any) -> JobQueue:
    return JobQueue(Settings(**settings), FeatureCache(0))


def put(jobs: JobQueue, key: str, data: bytes = b"1234") -> Job:
    held = jobs.hold(key, data)
    assert held is not None
    new = job(held, 1e6)
    jobs.put([new])
    return new


def test_the_queue_is_limited_by_count() -> None:
    jobs = queue(max_queue=2)
    put(jobs, "a")
    put(jobs, "b")
    with pytest.raises(RequestError) as error:
        put(jobs, "c")
    assert (error.value.status, error.value.code, error.value.retry_after) == (429, "queue_full", 1)
    assert len(jobs) == 2 and jobs.held_bytes == 8


def test_the_queue_is_limited_by_bytes_and_counts_an_image_once() -> None:
    jobs = queue(queue_bytes=10)
    first, second = put(jobs, "a"), put(jobs, "a")
    assert first.image is second.image and jobs.held_bytes == 4
    put(jobs, "b")
    with pytest.raises(RequestError):
        put(jobs, "c")
    assert jobs.drop(lambda each: each is first) == [first] and jobs.held_bytes == 8
    jobs.drop(lambda each: each is second)
    assert jobs.held_bytes == 4
    put(jobs, "c")


def test_jobs_are_put_all_or_none() -> None:
    jobs = queue(max_queue=3)
    held = [jobs.hold(key, b"12") for key in "abcd"]
    with pytest.raises(RequestError):
        jobs.put([job(each) for each in held if each])
    assert jobs.is_empty and jobs.held_bytes == 0


def test_jobs_that_can_start_are_taken_in_their_order() -> None:
    jobs = queue()
    first, second, third = put(jobs, "a"), put(jobs, "b"), put(jobs, "c")
    assert jobs.take(2, lambda each: each is not first) == [second, third]
    assert jobs.running == 2 and jobs.first(5) == [first]
    jobs.done(second)
    assert jobs.running == 1


def test_the_wait_is_what_waits_times_the_mean_over_the_slots() -> None:
    jobs = queue()
    jobs.slots = 2
    done = put(jobs, "a")
    jobs.take(1, lambda _: True)
    done.times.started, done.times.ended = 100.0, 103.0
    jobs.done(done)
    for key in "bcdef":
        put(jobs, key)
    assert jobs.retry_after() == 8  # 5 x 3 s / 2
    for _ in range(200):
        put(jobs, "b")
    assert jobs.retry_after() == 60


def test_what_cannot_be_met_is_not_begun() -> None:
    jobs = queue()
    done = put(jobs, "a")
    jobs.take(1, lambda _: True)
    done.times.started, done.times.ended = 100.0, 103.0
    jobs.done(done)
    held = HeldImage("b", b"")
    assert jobs.cannot_meet(job(held, 2.5)) and not jobs.cannot_meet(job(held, 3.5))


def test_what_would_wait_beyond_its_deadline_is_refused_at_once() -> None:
    jobs = queue()
    done = put(jobs, "a")
    jobs.take(1, lambda _: True)
    done.times.started, done.times.ended = 100.0, 103.0
    jobs.done(done)
    put(jobs, "b")
    put(jobs, "c")
    held = HeldImage("d", b"")
    with pytest.raises(RequestError) as error:
        jobs.put([job(held, 5.5)])
    assert (error.value.code, error.value.retry_after) == ("queue_full", 6)
    jobs.put([job(held, 6.5)])


def test_a_closed_queue() -> None:
    jobs = queue()
    jobs.close(RequestError(503, "draining", "Stopping."))
    with pytest.raises(RequestError, match="Stopping"):
        put(jobs, "a")


# ---- the worker ----------------------------------------------------------------------------------------------------


@pytest.fixture
def service(nano: florence2.Florence2) -> Iterator[Service]:
    made = Service(lambda: nano, Settings(max_batch=2))
    made.worker.start()
    while made.worker.model is None:
        time.sleep(0.01)
    yield made
    made.drain()
    made.worker.stop()


def local(service: Service) -> Worker:
    assert isinstance(service.worker, Worker)
    return service.worker


def ask(service: Service, task: str, data: bytes, **settings: Any) -> Job:
    held = service.hold(data, str(hash(data)), "")
    made = Job(service.check(task), held, service.model.options(**settings), time.monotonic() + 60)
    service.submit([made])
    return made


def test_questions_about_one_new_image_share_its_encoding(service: Service, image: bytes) -> None:
    asked = [ask(service, task, image) for task in ("<OD>", "<CAPTION>", "<OCR>")]
    done = [each.future.result(timeout=30) for each in asked]
    assert len({id(each.image) for each in done}) == 1
    assert ask(service, "<OD>", image).future.result(timeout=30).cached


def test_an_answer_is_heard_while_it_is_written(service: Service, image: bytes) -> None:
    heard: list[list[int]] = []
    held = service.hold(image, "x", "")
    made = Job(
        service.check("<CAPTION>"), held, service.model.options(num_beams=1), time.monotonic() + 60, heard.append
    )
    service.submit([made])
    answer = made.future.result(timeout=30).answer
    assert answer is not None and [len(ids) for ids in heard] == list(range(2, len(answer.token_ids)))
    assert heard[-1] == list(answer.token_ids[:-1])


def test_a_cancelled_job_leaves(service: Service, image: bytes) -> None:
    running, waiting = ask(service, "<OD>", image), [ask(service, "<OD>", image) for _ in range(4)]
    for each in (running, *waiting):
        each.future.cancel()
    end = time.monotonic() + 5
    while not service.is_drained and time.monotonic() < end:
        time.sleep(0.01)
    assert service.is_drained and service.queue.held_bytes == 0


def test_an_engine_that_fails_takes_nobody_after_it_along(
    service: Service, image: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(local(service)._answers, "step", fail)
        broken = ask(service, "<OD>", image)
        with pytest.raises(RuntimeError, match="out of memory"):
            broken.future.result(timeout=30)
    assert "out of memory" in capsys.readouterr().err
    assert ask(service, "<OD>", image).future.result(timeout=30).answer is not None
    assert service.queue.running == 0


def test_a_tower_that_fails(service: Service, image: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(florence2.Florence2, "encode_images", fail)
        with pytest.raises(RuntimeError):
            ask(service, "<OD>", image).future.result(timeout=30)
    assert ask(service, "<OD>", image).future.result(timeout=30).answer is not None


def test_an_encoding_alone(service: Service, image: bytes) -> None:
    held = service.hold(image, "y", "")
    made = Job(None, held, OPTIONS, time.monotonic() + 60)
    service.submit([made])
    done = made.future.result(timeout=30)
    assert done.answer is None and isinstance(done.image, EncodedImage)


def test_a_model_that_cannot_be_loaded() -> None:
    def load() -> florence2.Florence2:
        raise florence2.Florence2Error("The model is broken.")

    made = Service(load, Settings())
    made.worker.start()
    local(made)._thread.join(timeout=10)
    assert str(made.worker.failure) == "The model is broken."
    with pytest.raises(RequestError, match="being loaded"):
        made.check_ready()


def test_a_bug_is_500_with_an_id_and_nothing_else(
    nano: florence2.Florence2, image: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = create_app(nano, Settings(local=False), log=RequestLog(io.StringIO()))
    made: Service = app.state.service
    made.worker.start()
    while made.worker.model is None:
        time.sleep(0.01)

    def fail(*_: object) -> None:
        raise RuntimeError("a secret path /root/x")

    monkeypatch.setattr(local(made)._answers, "step", fail)
    reply = call(app, "POST", "/v1/chat/completions", chat_body("<OD>", image))
    assert reply.status == 500 and reply.error["code"] == "server_error" and "secret" not in reply.error["message"]
    assert reply.headers["x-request-id"] in reply.error["message"] and "a secret path" in capsys.readouterr().err
    made.worker.stop()
