"""The server's HTTP over a double of the engine: every status, whole and streamed answers, documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from ringctx.config import parse
from ringctx.errors import ConfigError
from ringctx.runtime.server.host import Opening
from tests.fake_engine import said
from tests.serving import Served, serving


@pytest.fixture
def served() -> Iterator[Served]:
    yield from serving()


@pytest.fixture
def locked() -> Iterator[Served]:
    yield from serving("secret")


def test_a_chat_is_answered_in_openais_form(served):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    reply = served.chat("", messages=messages, user="me", n=1, tools=[], temperature=1, top_p=0.5, seed=7)
    assert reply.status_code == 200
    data = reply.json()
    want = said("sS\nuHi\na")
    assert data["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": want, "refusal": None}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert data["object"] == "chat.completion" and data["model"] == "fake" and data["id"].startswith("chatcmpl-")
    usage = {"prompt_tokens": 8, "completion_tokens": len(want) + 1, "total_tokens": 9 + len(want)}
    assert data["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}
    chosen = served.engine.generation
    assert (chosen.temperature, chosen.top_p, chosen.seed, chosen.max_new_tokens) == (1.0, 0.5, 7, 50)


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]])
def test_a_completion_takes_one_text_or_its_tokens(served, prompt):
    data = served.client.post("/v1/completions", json={"model": "fake", "prompt": prompt, "max_tokens": 2}).json()
    assert data["choices"] == [{"index": 0, "text": "cb", "logprobs": None, "finish_reason": "length"}]
    assert data["object"] == "text_completion" and data["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(("stop", "want"), [("b", "c"), (["x", "a"], "cb"), (["<"], "cba")])
def test_a_stop_string_ends_the_answer_also_at_the_last_token(served, stop, want):
    body = {"model": "fake", "prompt": "abc", "stop": stop, "max_tokens": len(want) + 1}
    choice = served.client.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (want, "stop")


def events(reply: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_is_the_answer_in_pieces(served):
    reply = served.chat("Hi", stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    first, *pieces, last, counted = events(reply)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(pieces) > 3
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == said("uHi\na")
    assert last["choices"][0]["finish_reason"] == "stop" and counted["choices"] == [] and counted["usage"]["prompt_tokens"] == 5
    assert {p["object"] for p in pieces} == {"chat.completion.chunk"} and len({p["id"] for p in (first, *pieces, last)}) == 1


def test_a_streamed_completion_has_text_in_its_pieces(served):
    body = {"model": "fake", "prompt": "abc", "stream": True}
    pieces = events(served.client.post("/v1/completions", json=body))
    assert "".join(p["choices"][0]["text"] for p in pieces) == said("abc")


def test_a_document_is_read_once_and_asked_many_times(served):
    made = served.client.post("/v1/documents", json={"text": "In the beginning"})
    assert made.status_code == 201
    document = made.json()
    assert document["tokens"] == len("uIn the beginning|") and document["characters"] == 16
    for question in ("Who?", "What?", "Who?"):
        data = served.chat(question, document=document["id"]).json()
        assert data["choices"][0]["message"]["content"] == said(f"uIn the beginning|{question}\na")[:50]
        assert data["usage"]["prompt_tokens_details"] == {"cached_tokens": document["tokens"]}
    more = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "God"}, {"role": "user", "content": "Why?"}]
    assert served.chat("", messages=more, document=document["id"]).status_code == 200
    assert served.engine.asked[-1] == "uIn the beginning|Who?\naGod\nuWhy?\na"
    assert served.engine.documents == [list(b"uIn the beginning|")]
    assert served.client.get("/v1/documents").json()["data"] == [document]
    assert served.client.get(f"/v1/documents/{document['id']}").json() == document
    assert served.client.delete(f"/v1/documents/{document['id']}").json()["deleted"] is True
    for reply in (
        served.client.get(f"/v1/documents/{document['id']}"),
        served.client.delete(f"/v1/documents/{document['id']}"),
        served.chat("Who?", document=document["id"]),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "document_not_found")


def test_a_long_document_is_tokenised_by_its_end_alone(served):
    text, prompts = "word " * 2_000, served.engine.prompts
    opening = Opening.of(prompts, text)
    assert len(opening.tail) == 2_000
    assert opening.prompt(prompts, ({"role": "user", "content": "Who?"},)) == prompts.whole(text, "Who?")


def test_documents_are_limited_in_number_and_tokens(served):
    assert served.client.post("/v1/documents", json={"text": "a" * 50}).status_code == 201
    reply = served.client.post("/v1/documents", json={"text": "b" * 60})
    assert reply.status_code == 413
    assert "of the 100 for all documents 48 are left" in reply.json()["error"]["message"]
    second = served.client.post("/v1/documents", json={"text": "c"})
    assert second.status_code == 201
    assert served.client.post("/v1/documents", json={"text": "d"}).json()["error"]["code"] == "too_many_documents"
    served.client.delete(f"/v1/documents/{second.json()['id']}")
    assert served.client.post("/v1/documents", json={"text": "d"}).status_code == 201


USER = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": "Hi"}, "messages must be a list of messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content must be a text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls is not supported"),
        ({"model": None}, "model is missing"),
        ({"temperature": "hot"}, "temperature must be a number from 0 to 2"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": 1e-310}, "temperature must be 0 (the likeliest token) or at least"),
        ({"temperature": 10**400}, "temperature must be a number from 0 to 2"),
        ({"top_p": 0}, "top_p must be more than 0"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 100"),
        ({"max_tokens": 101}, "max_tokens must be a whole number from 1 to 100"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "give one of them"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"stop": [""]}, "stop must be a text"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options means nothing without stream"),
        ({"n": 2}, "n is not supported with this value"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"tempertaure": 1}, "There is no field 'tempertaure'; did you mean 'temperature'?"),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "The engine does not take this."),
    ],
)
def test_what_cannot_be_answered_is_400_with_a_sentence_and_others_go_on(served, fields, sentence):
    reply = served.client.post("/v1/chat/completions", content=json.dumps({"model": "fake", "messages": USER} | fields))
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"] and error["type"] == "invalid_request_error"
    assert sentence in error["message"]
    assert served.chat("x").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'{"a": NaN}',
        b"\xff",
        b"[" * 1_900,
        b'{"model": "fake", "prompt": "\\ud800"}',
        b'{"model": "fake", "prompt": "a", "seed": ' + b"9" * 1_900,
    ],
)
def test_what_is_no_json_is_400(served, body):
    assert served.client.post("/v1/completions", content=body).status_code == 400
    assert served.chat("x").status_code == 200


@pytest.mark.parametrize("prompt", [None, "", [], ["a", "b"], [1, "a"], [300], [-1], 5, {"a": 1}])
def test_prompts_that_cannot_be_right_are_400(served, prompt):
    assert served.client.post("/v1/completions", json={"model": "fake", "prompt": prompt}).status_code == 400


def test_neutral_values_and_null_are_taken(served):
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "stop": None}
    assert served.chat("x", **neutral).status_code == 200


def test_a_prompt_of_too_many_tokens_is_413(served):
    assert served.chat("x" * 97).status_code == 200
    reply = served.chat("x" * 98)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "prompt_too_large")


def test_a_question_longer_than_the_room_after_a_document_is_refused(served):
    document = served.client.post("/v1/documents", json={"text": "abc"}).json()["id"]
    reply = served.chat("x" * 200, document=document)
    assert reply.status_code == 400 and "raise server.question_tokens" in reply.json()["error"]["message"]
    system = [{"role": "system", "content": "s"}, *USER]
    assert "messages begin with the user's question" in served.chat("", messages=system, document=document).json()["error"]["message"]


def test_another_model_document_route_or_method_is_refused(served):
    assert served.chat("x", model="gpt").json()["error"]["code"] == "model_not_found"
    assert served.chat("x", model="gpt").status_code == 404
    assert served.chat("x", document="doc-none").status_code == 404
    assert served.client.get("/v1/models").json()["data"][0]["id"] == "fake"
    assert served.client.get("/v1/models/fake").status_code == 200
    assert served.client.get("/v1/models/gpt").status_code == 404
    assert served.client.get("/v2").json()["error"]["code"] == "no_such_route"
    assert served.client.put("/v1/models").status_code == 405


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic secret", "Bearer", "secret", "Bearer s\u00e9cret".encode("latin-1")])
def test_without_the_token_nothing_is_answered(locked, header):
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/documents"), ("GET", "/metrics"), ("GET", "/v1/models")):
        reply = locked.client.request(method, path, headers=headers)
        assert (reply.status_code, reply.json()["error"]["type"]) == (401, "authentication_error")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert locked.client.get("/health").status_code == 200
    assert locked.client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_body_that_is_too_long_is_413_whether_it_says_so_or_not(served):
    assert served.chat("x" * 3_000).status_code == 413
    parts = (b"x" * 500 for _ in range(10))
    reply = served.client.post("/v1/completions", content=parts)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


def test_metrics_count_replies_and_tokens(served):
    served.chat("x")
    served.chat("x", n=3)
    served.client.post("/v1/documents", json={"text": "abc"})
    text = served.client.get("/metrics").text
    for line in (
        'ringctx_replies_total{route="/v1/chat/completions",status="200"} 1.0',
        'ringctx_replies_total{route="/v1/chat/completions",status="400"} 1.0',
        'ringctx_tokens_total{kind="prompt"} 4.0',
        "ringctx_documents 1.0",
        "ringctx_document_tokens 5.0",
        "ringctx_waiting 0.0",
    ):
        assert line in text


LOCAL = [("127.0.0.1", None), ("::1", None), ("localhost", None), ("0.0.0.0", "t"), ("example", "t")]
OPEN = [("0.0.0.0", None), ("192.168.0.1", None), ("example", None), ("", None)]


@pytest.mark.parametrize(("host", "token", "is_fine"), [(*one, True) for one in LOCAL] + [(*one, False) for one in OPEN])
def test_other_machines_need_a_token(host, token, is_fine):
    pytest.importorskip("uvicorn")
    pytest.importorskip("transformers")
    from ringctx.runtime.server.serve import check

    config = parse(f"server: {{host: '{host}'}}")
    if is_fine:
        check(config, token)
        return
    with pytest.raises(ConfigError, match=r"a token is needed; set RINGCTX_TOKEN"):
        check(config, token)
