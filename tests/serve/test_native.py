"""The typed route: several tasks on one image, regions, forms, images by their hash, cascades, streams."""

import base64
import hashlib
import json
from typing import Any

import pytest

import florence2
from tests.serve.server import RunningServer, native_body, png

BOX = [18, 113, 56, 166]


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_several_tasks_share_one_encoding(server: RunningServer, nano: florence2.Florence2, new_image: bytes) -> None:
    before = server.metric("picture_encode_seconds_count")
    tasks = ["od", "<CAPTION>", {"task": "region_to_category", "box": BOX}]
    reply = server.post("/v1/florence2", native_body(new_image, *tasks)).json
    right = [
        nano.run("<OD>", new_image),
        nano.run("<CAPTION>", new_image),
        nano.run("<REGION_TO_CATEGORY>", new_image, box=BOX),
    ]
    assert [answer["text"] for answer in reply["answers"]] == [answer.text for answer in right]
    assert reply["picture"] == {
        "sha256": hashlib.sha256(new_image).hexdigest(),
        "width": 320,
        "height": 200,
        "cached": False,
    }
    assert set(reply["timing"]) == {"queue_ms", "encode_ms", "decode_ms"} and reply["timing"]["encode_ms"] > 0
    assert server.metric("picture_encode_seconds_count") == before + 1


def test_an_image_by_its_hash(server: RunningServer, image: bytes) -> None:
    sha256 = server.post("/v1/florence2", native_body(image, "od")).json["picture"]["sha256"]
    body = {"image": {"sha256": sha256.upper()}, "tasks": [{"task": "caption"}]}
    reply = server.post("/v1/florence2", body)
    assert reply.status == 200 and reply.json["picture"]["cached"] and reply.json["timing"]["encode_ms"] == 0
    body["image"]["sha256"] = "0" * 64
    reply = server.post("/v1/florence2", body)
    assert (reply.status, reply.code) == (404, "picture_not_cached")


@pytest.mark.parametrize("size", [0, 3 << 20])  # read in the event loop, and in a thread
def test_base64_in_lines(server: RunningServer, new_image: bytes, size: int) -> None:
    data = new_image + bytes(size)
    body = native_body(data, "caption", options={"num_beams": 1, "max_new_tokens": 2})
    body["image"]["data"] = base64.encodebytes(data).decode()
    reply = server.post("/v1/florence2", body)
    assert reply.status == 200 and reply.json["picture"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_form(server: RunningServer, nano: florence2.Florence2, image: bytes) -> None:
    request = json.dumps({"tasks": [{"task": "od"}], "options": {"num_beams": 1}})
    reply = server.post("/v1/florence2", *form(image=image, request=request.encode()))
    assert reply.json["answers"][0]["text"] == nano.run("<OD>", image, num_beams=1).text


def form(**fields: bytes) -> tuple[bytes, dict[str, str]]:
    parts = [
        b"--x\r\ncontent-disposition: form-data; name=%b%b\r\n\r\n%b\r\n"
        % (json.dumps(name).encode(), b'; filename="a.png"' if name == "image" else b"", value)
        for name, value in fields.items()
    ]
    return b"".join(parts) + b"--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}


def test_a_cascade_among_other_tasks(server: RunningServer, nano: florence2.Florence2, image: bytes) -> None:
    reply = server.post("/v1/florence2", native_body(image, "cascade", "od")).json
    got, right = reply["answers"][0], nano.cascade(image).to_dict()
    assert got["task"] == "cascade" and got["caption"]["text"] == right["caption"]["text"]
    assert got["grounding"]["text"] == right["grounding"]["text"]
    assert [segment["text"] for segment in got["segments"]] == [segment["text"] for segment in right["segments"]]
    assert reply["answers"][1]["task"] == "<OD>"


def test_a_wrong_task_has_its_error_in_its_place(server: RunningServer, image: bytes) -> None:
    reply = server.post("/v1/florence2", native_body(image, "captoin", "od", {"task": "cascade", "text": "x"}))
    first, second, third = reply.json["answers"]
    assert first["error"]["code"] == third["error"]["code"] == "invalid_prompt" and second["task"] == "<OD>"
    assert "did you mean caption?" in first["error"]["message"]


def test_a_stream_gives_boxes_as_they_close(server: RunningServer, nano: florence2.Florence2, image: bytes) -> None:
    reply = server.post("/v1/florence2", native_body(image, "od", "caption", stream=True, options={"num_beams": 1}))
    *events, last, end = [line for line in reply.body.decode().split("\n\n") if line]
    assert reply.headers["content-type"].startswith("text/event-stream") and end == "data: [DONE]"
    values = [json.loads(event.removeprefix("data: ")) for event in events]
    answer = nano.run("<OD>", image, num_beams=1)
    boxes = [box["xyxy"] for value in values if "boxes" in value for box in value["boxes"]]
    assert boxes == plain([box.xyxy for box in answer.boxes]) and len([v for v in values if "boxes" in v]) > 1
    assert [value["answer"]["task"] for value in values if "answer" in value] == ["<OD>", "<CAPTION>"]
    assert json.loads(last.removeprefix("data: "))["picture"]["cached"]


@pytest.mark.parametrize(
    ("body", "status", "code", "word"),
    [
        ({"tasks": [{"task": "od"}]}, 400, "invalid_image", "given by nothing"),
        (
            {"image": {"data": "aGk=", "sha256": "0" * 64}, "tasks": [{"task": "od"}]},
            400,
            "invalid_image",
            "data, sha256",
        ),
        ({"image": {"data": "?"}, "tasks": [{"task": "od"}]}, 400, "invalid_image", "not base64"),
        ({"image": {"data": "aGVsbG8="}, "tasks": [{"task": "od"}]}, 400, "invalid_image", "not an image"),
        ({"image": {"url": "file:///etc/passwd"}, "tasks": [{"task": "od"}]}, 400, "url_not_allowed", "URLs are not"),
        ({"image": {"sha256": "../../etc"}, "tasks": [{"task": "od"}]}, 400, "invalid_image", "64 hexadecimal"),
        ({"image": "", "tasks": []}, 400, "invalid_value", "tasks is []"),
        ({"image": "", "tasks": [{"task": "od"}] * 33}, 400, "invalid_value", "at most 32"),
        ({"image": "", "tasks": [{"task": 5}]}, 400, "invalid_value", "tasks[0].task is 5"),
        ({"image": "", "tasks": [{"task": "od"}], "options": {"num_beams": 0}}, 400, "invalid_value", "num_beams is 0"),
        ({"image": "", "tasks": [{"task": "od"}], "model": "x"}, 404, "model_not_found", "'x'"),
        ({"image": "", "tasks": [{"task": "od", "box": BOX, "text": "x"}]}, 400, "invalid_prompt", "both"),
    ],
)
def test_wrong_bodies(server: RunningServer, body: Any, status: int, code: str, word: str) -> None:
    reply = server.post("/v1/florence2", body)
    assert (reply.status, reply.code) == (status, code) and word in reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", None, 400, "invalid_json"),
        (b"[]", None, 400, "invalid_json"),
        (b'{"tasks": NaN}', None, 400, "invalid_json"),
        (b"\xff\xfe", None, 400, "invalid_json"),
        (b"[" * 50_000, None, 400, "invalid_json"),
        (b"[" + b"[]," * 200_000 + b"[]]", None, 400, "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", None, 400, "invalid_json"),
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {}, 415, "unsupported_media_type"),
        (b"{}", {"content-type": "multipart/form-data"}, 400, "invalid_form"),
        (b"{}", {"content-type": "multipart/form-data; boundary=x"}, 400, "invalid_form"),
        (b"{}", {"content-type": "application/json", "x-request-timeout-ms": "soon"}, 400, "invalid_value"),
    ],
)
def test_bodies_that_are_not_read(
    server: RunningServer, body: bytes, headers: dict[str, str] | None, status: int, code: str
) -> None:
    reply = server.post("/v1/florence2", body, headers)
    assert (reply.status, reply.code) == (status, code)


def test_a_body_that_is_too_long(server: RunningServer) -> None:
    body = b'{"image": "' + base64.b64encode(bytes(16 << 20)) + b'"}'
    reply = server.post("/v1/florence2", body)
    assert (reply.status, reply.code) == (413, "body_too_large")


def test_other_routes(server: RunningServer, nano: florence2.Florence2) -> None:
    tasks = server.call("GET", "/v1/tasks").json["tasks"]
    assert [task["task"] for task in tasks] == list(nano.processor.tasks)
    assert server.call("GET", "/health").json == {"status": "ok"} and server.call("GET", "/ready").status == 200
    version = server.call("GET", "/version").json
    assert version["version"] == florence2.__version__ and len(version["weights_sha256"]) == 64
    page = server.call("GET", "/")
    assert page.headers["content-security-policy"] == "default-src 'self'; img-src 'self' blob: data:"
    for path in ("/nothing", "/page/routes.py", "/page/..%2fapp.py", "/docs", "/redoc"):
        assert server.call("GET", path).code == "not_found"
    assert server.call("GET", "/v1/florence2").code == "method_not_allowed"
    paths = server.call("GET", "/openapi.json").json["paths"]
    assert {"/v1/chat/completions", "/v1/florence2", "/v1/models", "/v1/tasks", "/metrics"} <= set(paths)


def test_the_log_has_a_line_for_each_request_without_its_contents(server: RunningServer, image: bytes) -> None:
    secret = "a secret phrase"
    body = native_body(image, {"task": "caption_to_phrase_grounding", "text": secret}, secret)
    reply = server.post("/v1/florence2", body)
    server.call("GET", f"/{secret.replace(' ', '-')}")
    line = server.wait_for_line(id=reply.headers["x-request-id"], route="/v1/florence2")
    assert line["status"] == 200 and line["task"] == "other" and line["cached"] and line["tokens"] > 0
    assert line["id"].startswith("req-") and line["decode_ms"] > 0
    assert "secret" not in server.words()


def test_bombs_are_refused_by_their_headers(server: RunningServer) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(60_001))) + chunk(b"IEND", b"")
    )
    reply = server.post("/v1/florence2", native_body(bomb, "od"))
    assert (reply.status, reply.code) == (400, "image_too_large")


def test_a_png_with_one_pixel_is_answered(server: RunningServer) -> None:
    assert server.post("/v1/florence2", native_body(png(1, 1, 1), "caption")).status == 200
