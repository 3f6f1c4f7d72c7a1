"""OpenAI's route: the official client, a curl line, and every body that the published schema accepts."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jsonschema
import openai
import pytest

import florence2
from tests.serve.server import RunningServer, chat_body, data_url, messages, png

SCHEMA = json.loads((Path(__file__).parent / "published.schema.json").read_text())
BOX = (18, 113, 56, 166)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_a_completion_is_the_librarys_answer(client: openai.OpenAI, nano: florence2.Florence2, image: bytes) -> None:
    done = client.chat.completions.create(model="nano", messages=messages("<OD>", image))
    answer, choice = nano.run("<OD>", image), done.choices[0]
    assert choice.message.content == str(answer) and choice.finish_reason == "stop" and done.model == "nano"
    extra = choice.message.model_extra
    assert extra["florence2_result"]["<OD>"]["labels"] == answer.to_florence()["<OD>"]["labels"]
    boxes = extra["florence2"]["boxes"]
    assert [box["xyxy"] for box in boxes] == plain([box.xyxy for box in answer.boxes])
    assert [box["confidence"] for box in boxes] == pytest.approx([box.confidence for box in answer.boxes], abs=1e-4)
    assert done.usage.completion_tokens == len(answer.token_ids) - 1


def test_a_second_question_costs_no_second_encoding(client: openai.OpenAI, new_image: bytes) -> None:
    first, second = (
        client.chat.completions.create(model="nano", messages=messages(task, new_image)).usage
        for task in ("<CAPTION>", "<OD>")
    )
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_several_answers_with_log_probabilities(client: openai.OpenAI, nano: florence2.Florence2, image: bytes) -> None:
    done = client.chat.completions.create(model="nano", messages=messages("<CAPTION>", image), n=2, logprobs=True)
    answer = nano.run("<CAPTION>", image, num_return_sequences=2)
    assert [choice.message.content for choice in done.choices] == [str(answer), str(answer.alternatives[0])]
    tokens = done.choices[0].logprobs.content
    assert [token.logprob for token in tokens] == pytest.approx(answer.token_logprobs, abs=1e-4)
    assert "".join(token.token for token in tokens) == "".join(answer.token_texts[1:])


def test_json_in_the_content(client: openai.OpenAI, nano: florence2.Florence2, image: bytes) -> None:
    done = client.chat.completions.create(
        model="nano", messages=messages("<OD>", image), response_format={"type": "json_object"}
    )
    assert (
        json.loads(done.choices[0].message.content)["<OD>"]["labels"]
        == nano.run("<OD>", image).to_florence()["<OD>"]["labels"]
    )


@pytest.mark.parametrize(("task", "beams"), [("<CAPTION>", 1), ("<CAPTION>", None), ("<OD>", 1)])
def test_a_stream_gives_the_same_answer(
    client: openai.OpenAI, nano: florence2.Florence2, image: bytes, task: str, beams: int | None
) -> None:
    extra = {"florence2": {"num_beams": beams}} if beams else {}
    chunks = list(
        client.chat.completions.create(
            model="nano",
            messages=messages(task, image),
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
    )
    settings = {"num_beams": beams} if beams else {}
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(text or "" for text in texts) == str(nano.run(task, image, **settings))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices
    streams = task == "<CAPTION>" and beams == 1
    assert len([text for text in texts if text]) > 5 if streams else len([text for text in texts if text]) == 1


def test_a_region_in_pixels_and_settings(client: openai.OpenAI, nano: florence2.Florence2, image: bytes) -> None:
    done = client.chat.completions.create(
        model="nano",
        messages=messages("<REGION_TO_DESCRIPTION>", image),
        max_tokens=3,
        temperature=0.5,
        seed=4,
        extra_body={"florence2": {"box": BOX, "num_beams": 1}},
    )
    answer = nano.run("<REGION_TO_DESCRIPTION>", image, box=BOX, num_beams=1, max_new_tokens=3)
    assert done.choices[0].message.content == str(answer) and done.choices[0].finish_reason == "length"
    assert done.choices[0].message.model_extra["florence2"]["ignored"] == ["temperature", "seed"]


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found"),
        ({"n": 9}, openai.BadRequestError, "invalid_value"),
        ({"max_tokens": 0}, openai.BadRequestError, "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "unsupported_parameter"),
        ({"messages": messages("<OD>", b"no image")}, openai.BadRequestError, "invalid_image"),
        ({"messages": messages("<OD>", "https://example.com/a.png")}, openai.BadRequestError, "url_not_allowed"),
        ({"messages": messages("<OD>", "/etc/passwd")}, openai.BadRequestError, "url_not_allowed"),
        ({"messages": messages("captoin", png())}, openai.BadRequestError, "invalid_prompt"),
        ({"messages": messages("word " * 3000, png())}, openai.BadRequestError, "invalid_prompt"),
        ({"messages": [{"role": "user", "content": "<OD>"}] * 300}, openai.BadRequestError, "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "invalid_prompt"),
        ({"messages": [{"role": "user", "content": "<OD>"}]}, openai.BadRequestError, "invalid_prompt"),
        ({"messages": [{"role": "robot", "content": "<OD>"}]}, openai.BadRequestError, "invalid_value"),
        ({"stream": True, "messages": messages("<OD>", b"no image")}, openai.BadRequestError, "invalid_image"),
    ],
)
def test_errors_have_the_clients_classes(
    client: openai.OpenAI, image: bytes, fields: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "nano", "messages": messages("<OD>", image), **fields})
    assert raised.value.code == code and raised.value.body["message"].endswith(".")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").owned_by == "florence2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("microsoft/Florence-2-huge")


def test_the_latest_image_and_text_count(server: RunningServer, nano: florence2.Florence2, image: bytes) -> None:
    turns = [
        {"role": "system", "content": "Answer."},
        *messages("<CAPTION>", image),
        {"role": "assistant", "content": "a red digit"},
        {"role": "user", "content": "<OD>"},
    ]
    reply = server.post("/v1/chat/completions", {"messages": turns})
    assert reply.json["choices"][0]["message"]["content"] == str(nano.run("<OD>", image))


def test_an_image_inside_of_the_text(server: RunningServer, nano: florence2.Florence2, image: bytes) -> None:
    content = f'<OD><img src="{data_url(image)}"/>'
    reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert reply.json["choices"][0]["message"]["content"] == str(nano.run("<OD>", image))


def test_two_images_are_one_too_many(server: RunningServer, image: bytes) -> None:
    body = chat_body("<OD>", image)
    body["messages"][0]["content"].append(body["messages"][0]["content"][0])
    assert server.post("/v1/chat/completions", body).code == "unsupported_parameter"


def test_curl(server: RunningServer, nano: florence2.Florence2, image: bytes, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "body.json").write_text(json.dumps(chat_body("<CAPTION>", image)))
    words = ["curl", "-sS", f"http://127.0.0.1:{server.port}/v1/chat/completions"]
    words += ["-H", "Content-Type: application/json", "-d", f"@{tmp_path / 'body.json'}"]
    done = subprocess.run(words, capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == str(nano.run("<CAPTION>", image))


# ---- the published schema ------------------------------------------------------------------------------------------


PARTS = SCHEMA["properties"]["messages"]["items"]["properties"]["content"]["items"]["oneOf"]
TAGS = PARTS[1]["properties"]["text"]["enum"]
INPUT_TAGS = PARTS[2]["properties"]["text"]["allOf"][1]["pattern"]
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
TEXTS = st.sampled_from(TAGS) | st.builds("{}{}{}".format, WORDS, st.from_regex(INPUT_TAGS, fullmatch=True), WORDS)
EXTRAS = st.dictionaries(st.text(max_size=6).map("x_{}".format), st.none() | st.integers() | WORDS, max_size=2)


@st.composite
def accepted_bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Bodies that the schema accepts, with one image and one text, in one turn or in two, in any order."""
    image = {"type": "image_url", "image_url": {"url": data_url(IMAGE), **draw(EXTRAS)}, **draw(EXTRAS)}
    parts = draw(st.permutations([image, {"type": "text", "text": draw(TEXTS), **draw(EXTRAS)}]))
    contents = [[part] for part in parts] if draw(st.booleans()) else [parts]
    turns = [{"role": "user", "content": content, **draw(EXTRAS)} for content in contents]
    return {"messages": turns, **draw(EXTRAS)}


IMAGE = png(1)


@hypothesis.settings(max_examples=10, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(accepted_bodies())
def test_bodies_that_the_published_schema_accepts(server: RunningServer, body: dict[str, Any]) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(body)
    reply = server.post("/v1/chat/completions", body | {"max_tokens": 2})
    assert reply.status == 200, reply.body


@pytest.mark.parametrize("tag", ["REGION_TO_SEGMENTATION", "REGION_TO_CATEGORY", "PHRASE_GROUNDING"])
@pytest.mark.parametrize("text", ["<{tag}>", "<{tag}>a red digit", "before <{tag}> and <{tag}> after"])
def test_texts_that_the_schema_accepts_and_no_model_was_trained_on(
    server: RunningServer, image: bytes, tag: str, text: str
) -> None:
    body = chat_body(text.format(tag=tag), image, max_tokens=4)
    jsonschema.validate(body, SCHEMA)
    reply = server.post("/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    about = reply.json["choices"][0]["message"]["florence2"]
    assert about["task"] == ("<CAPTION_TO_PHRASE_GROUNDING>" if tag == "PHRASE_GROUNDING" else f"<{tag}>")
    assert ("note" in about) == (tag.startswith("REGION") or text == "<{tag}>")


@pytest.mark.release
def test_sixteen_clients_get_the_librarys_tokens(server: RunningServer, nano: florence2.Florence2) -> None:
    """All tasks at random, with waits, on few images: each answer is the one of the library alone."""
    from tests.serve.agreement import disagreements

    started = time.monotonic()
    assert disagreements(server, nano, requests=24, clients=16, images=2, seed=1) == []
    assert time.monotonic() - started < 60
