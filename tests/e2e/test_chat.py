"""Chats on a real cluster: through the handle of Serve, whose errors and cancellations are its own."""

import json
from typing import Any

import pytest

from tests.e2e.conftest import Running
from tests.serve_app.language import events

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SSE = {"Accept": "text/event-stream"}


def begin(running: Running) -> str:
    """A conversation."""
    answer = running.client.post("/v1/conversations", json={})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def said_in(running: Running, conversation: str) -> list[dict[str, Any]]:
    """Its messages."""
    data: list[dict[str, Any]] = running.client.get(f"/v1/conversations/{conversation}/messages").json()["data"]
    return data


def test_a_chat_on_a_cluster_is_answered_and_kept(running: Running) -> None:
    talk = begin(running)
    path = f"/v1/conversations/{talk}/messages"
    answer = running.client.post(path, json={"content": "hello", "max_tokens": 40, "seed": 3})
    assert answer.status_code == 200, answer.text
    told = events(running.client.post(path, json={"content": "go on", "max_tokens": 300, "seed": 4}, headers=SSE).text)
    last = json.loads(told[-1][1])
    assert (told[-1][0], last["history"]["used"]) == ("message", 2)
    assert "".join(json.loads(data)["text"] for _, data in told[:-1]) == last["answer"]["content"]
    kept = [message["content"] for message in said_in(running, talk)]
    assert kept == ["hello", answer.json()["answer"]["content"], "go on", last["answer"]["content"]]


def test_what_the_replica_refuses_has_its_own_status(running: Running) -> None:
    talk = begin(running)
    # 8192 tokens of cache, a byte each in the tiny vocabulary
    body = {"content": "y" * 8000, "max_tokens": 4096}
    answer = running.client.post(f"/v1/conversations/{talk}/messages", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "message_too_long")
    answer = running.client.post(f"/v1/conversations/{talk}/messages", json={"content": "a nude child"})
    assert (answer.status_code, answer.json()["code"]) == (422, "content_minors")
    assert said_in(running, talk) == []


def test_a_reader_who_leaves_a_cluster_stops_the_model(running: Running) -> None:
    """Only one of these fits into the cache at a time: the last message would stand behind all of them."""
    talk = begin(running)
    path = f"/v1/conversations/{talk}/messages"
    for number in range(3):
        # greedy, the tiny model never ends by itself
        body = {"content": f"hello {number}", "max_tokens": 4000, "temperature": 0}
        with running.client.stream("POST", path, json=body, headers=SSE) as stream:
            assert stream.status_code == 200
            assert next(stream.iter_lines()) == "event: piece"
    answer = running.client.post(path, json={"content": "still there?", "max_tokens": 5, "seed": 8})
    assert answer.status_code == 200, answer.text
    assert [message["sender"] for message in said_in(running, talk)] == ["user", "assistant"]
    assert said_in(running, talk)[0]["content"] == "still there?"
