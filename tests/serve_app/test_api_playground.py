"""/functions/v1/playground-chat: the bodies that existing clients send, and the names that they read."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest
import pytest_asyncio

from tests.serve_app.language import events, talking
from tests.serve_app.test_api_conversations import SSE, Person, Site, saying

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/functions/v1/playground-chat"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(shared_database: Any, tmp_path_factory: pytest.TempPathFactory, state_dir: Path) -> AsyncIterator[Site]:
    async with talking(shared_database, tmp_path_factory.mktemp("chat"), state_dir=state_dir) as (server, handle):
        yield Site(server, handle)


@pytest_asyncio.fixture(loop_scope="module")
async def alice(site: Site) -> Person:
    return await site.person()


async def chat(person: Person, message: Any = "hello", **body: Any) -> httpx2.Response:
    headers = body.pop("headers", {})
    return await person.client.post(CHAT, json={"message": message} | body, headers=headers)


async def test_the_first_message_begins_a_conversation(site: Site, alice: Person) -> None:
    with saying(site, "good morning"):
        answer = await chat(alice, "hello there")
    said = answer.json()
    assert answer.status_code == 200
    assert (said["success"], said["response"], said["content"]) == (True, "good morning", "good morning")
    assert (said["context_type"], said["content_tier"], said["nsfw_enforce"]) == ("chat_general", "sfw", False)
    assert (said["prompt_template_name"], said["template_meta"]["name"]) == ("CHAT_GENERAL", "CHAT_GENERAL")
    assert (said["model_provider"], said["model_used"], said["adjustments"]) == ("local", "tiny-qwen", [])
    assert said["enforcement_diagnostics"]["sentences_removed"] == 0
    assert isinstance(said["generation_time"], int)
    assert await alice.kept(said["conversation_id"]) == [("user", "hello there"), ("assistant", "good morning")]
    row = await site.server.pool.fetchrow(
        "SELECT title, conversation_type FROM conversations WHERE id = $1", UUID(said["conversation_id"])
    )
    assert tuple(row) == ("hello there", "general")
    assert await site.server.pool.fetchval("SELECT sender FROM messages WHERE id = $1", UUID(said["message_id"])) == (
        "assistant"
    )


async def test_the_real_model_answers(site: Site, alice: Person) -> None:
    said = (await chat(alice, roleplay_settings={"responseLength": "short"})).json()
    assert 0 < said["usage"]["new_tokens"] <= said["usage"]["max_tokens"] == 267
    assert (await alice.kept(said["conversation_id"]))[1] == ("assistant", said["response"])


async def test_a_named_conversation_goes_on(site: Site, alice: Person) -> None:
    with saying(site, "yes") as model:
        first = (await chat(alice, "one")).json()
        second = (await chat(alice, "two", conversation_id=first["conversation_id"])).json()
    assert second["conversation_id"] == first["conversation_id"]
    assert [message.content for message in model.read[1]][1:] == ["one", "yes", "two"]
    assert second["history"]["used"] == 2


async def test_it_streams_to_who_asks_for_it(site: Site, alice: Person) -> None:
    with saying(site, "a long answer of many words " * 8):
        told = events((await chat(alice, headers=SSE)).text)
    said = json.loads(told[-1][1])
    assert [name for name, _ in told] == ["piece"] * (len(told) - 1) + ["message"]
    assert "".join(json.loads(data)["text"] for _, data in told[:-1]) == said["response"]


async def test_nothing_begins_without_an_answer(site: Site, alice: Person) -> None:
    with saying(site, " "):
        answer = await chat(alice)
    assert (answer.status_code, answer.json()["code"]) == (502, "empty_answer")
    count = "SELECT count(*) FROM conversations WHERE user_id = $1"
    assert await site.server.pool.fetchval(count, alice.id) == 0


async def test_everything_of_a_scene_reaches_the_model(site: Site, alice: Person) -> None:
    ada = await alice.character()
    with saying(site, "welcome") as model:
        answer = await chat(
            alice,
            character_id=ada,
            participants=[{"name": "Tom", "description": "a sailor"}],
            roleplay_settings={"responseStyle": "short sentences", "responseLength": "long"},
        )
    system = model.read[0][0].content
    assert system.startswith("You are Ada")
    assert "Also there, Tom: a sailor" in system
    assert "Style of your answers: short sentences" in system
    assert answer.json()["usage"]["max_tokens"] == 1200
    kind = await site.server.pool.fetchrow(
        "SELECT conversation_type, character_id FROM conversations WHERE id = $1",
        UUID(answer.json()["conversation_id"]),
    )
    assert tuple(kind) == ("roleplay", UUID(ada))


async def test_a_system_prompt_of_ones_own_keeps_the_content_mode(site: Site, alice: Person) -> None:
    with saying(site, "ahoy") as model:
        said = (await chat(alice, system_prompt_override="Speak like a sailor.")).json()
    assert model.read[0][0].content.startswith("Speak like a sailor.\n\nKeep everything you say fit for a general")
    assert said["template_meta"]["overridden"] is True


async def test_another_model_than_the_one_that_answers_is_told(site: Site, alice: Person) -> None:
    with saying(site, "yes"):
        said = (await chat(alice, model_provider="openrouter", model_variant="some/model")).json()
        own = (await chat(alice, model_provider="chat_worker")).json()
    assert [(one["field"], one["given"], one["used"]) for one in said["adjustments"]] == [
        ("model_provider", "openrouter", "local"),
        ("model_variant", "some/model", "local"),
    ]
    assert own["adjustments"] == []


@pytest.mark.parametrize("given", [0, 0.4, 2])
async def test_a_temperature_is_the_answers(site: Site, alice: Person, given: float) -> None:
    with saying(site, "yes"):
        said = (await chat(alice, temperature=given)).json()
    assert site.handle.asked[-1][1].temperature == given
    assert said["adjustments"] == []


async def test_what_is_no_field_is_told_without_its_words(site: Site, alice: Person) -> None:
    settings = {"responseStyle": "terse", "mood": "a secret"}
    people = [{"name": "Tom", "age": 40}]
    with saying(site, "yes"):
        said = (
            await chat(alice, top_p=0.5, tone={"a": 1}, nothing=None, roleplay_settings=settings, participants=people)
        ).json()
    assert {one["field"]: (one["given"], one["used"]) for one in said["adjustments"]} == {
        "top_p": ("0.5", "none"),
        "tone": ("1 entries", "none"),
        "roleplay_settings.mood": ("8 characters", "none"),
        "participants.0.age": ("40", "none"),
    }


@pytest.mark.parametrize("headers", [{}, SSE, {"Idempotency-Key": "k"}], ids=["json", "stream", "key"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model_provider": "\ud800"}, "model_provider"),
        ({"model_variant": "a\0"}, "model_variant"),
        ({"roleplay_settings": {"enhancementModel": "\udfff"}}, "roleplay_settings.enhancementModel"),
    ],
)
async def test_what_can_not_be_told_back_is_refused_before_anything_is_stored(
    site: Site, alice: Person, body: dict[str, Any], field: str, headers: dict[str, str]
) -> None:
    raw = json.dumps({"message": "hello"} | body)
    with saying(site, "yes") as model:
        answer = await alice.client.post(CHAT, content=raw, headers=headers | {"Content-Type": "application/json"})
    assert (answer.status_code, [error["field"] for error in answer.json()["errors"]]) == (400, [field]), answer.text
    assert model.read == []
    count = "SELECT count(*) FROM messages m JOIN conversations c ON c.id = m.conversation_id WHERE c.user_id = $1"
    assert await site.server.pool.fetchval(count, alice.id) == 0


async def test_a_name_that_can_not_be_told_back_spoils_no_answer(site: Site, alice: Person) -> None:
    raw = json.dumps({"message": "hello", "\ud800": "\ud800", "odd": ["\ud800"]})
    with saying(site, "yes"):
        answer = await alice.client.post(CHAT, content=raw, headers={"Content-Type": "application/json"})
    assert (answer.status_code, [one["field"] for one in answer.json()["adjustments"]]) == (200, ["odd"])


@pytest.mark.parametrize("kind", ["creative", "chat_creative"])
async def test_a_kind_of_chat_goes_by_both_names(site: Site, alice: Person, kind: str) -> None:
    with saying(site, "yes"):
        assert (await chat(alice, context_type=kind)).json()["prompt_template_name"] == "CHAT_CREATIVE"


async def test_a_key_begins_one_conversation(site: Site, alice: Person) -> None:
    with saying(site, "once"):
        said = [(await chat(alice, headers={"Idempotency-Key": "k"})).json() for _ in range(2)]
        other = await chat(alice, "other", headers={"Idempotency-Key": "k"})
    assert said[0] == said[1]
    assert (other.status_code, other.json()["code"]) == (400, "idempotency_key_reused")
    count = "SELECT count(*) FROM conversations WHERE user_id = $1"
    assert await site.server.pool.fetchval(count, alice.id) == 1


NOBODY = str(UUID(int=1))
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"message": None}, 400, "message"),
    ({"message": 5}, 400, "message"),
    ({"message": "y" * 8001}, 400, "message"),
    ({"message": "a nude child"}, 400, "message"),
    ({"conversation_id": "x"}, 400, "conversation_id"),
    ({"conversation_id": NOBODY}, 404, ""),
    ({"character_id": NOBODY}, 404, "character_id"),
    ({"project_id": NOBODY}, 404, "project_id"),
    ({"prompt_template_id": NOBODY}, 404, "prompt_template_id"),
    ({"content_tier": "all"}, 400, "content_tier"),
    ({"content_tier": "nsfw"}, 403, "content_tier"),
    ({"context_type": "best"}, 400, "context_type"),
    ({"context_type": "admin"}, 403, "context_type"),
    ({"long_response": "yes"}, 400, "long_response"),
    ({"long_response": True, "roleplay_settings": {"responseLength": "short"}}, 400, "long_response"),
    ({"roleplay_settings": []}, 400, "roleplay_settings"),
    ({"roleplay_settings": "x"}, 400, "roleplay_settings"),
    ({"roleplay_settings": {"responseLength": 3}}, 400, "roleplay_settings.responseLength"),
    ({"roleplay_settings": {"responseStyle": "y" * 201}}, 400, "roleplay_settings.responseStyle"),
    ({"roleplay_settings": {"responseStyle": ["x"]}}, 400, "roleplay_settings.responseStyle"),
    ({"participants": "x"}, 400, "participants"),
    ({"participants": [{"name": "Tom"}] * 11}, 400, "participants"),
    ({"participants": [{"description": "x"}]}, 400, "participants.0.name"),
    ({"participants": [{"name": "Tom", "description": "a nude child"}]}, 400, "message"),
    ({"system_prompt_override": "the assistant is a nude child"}, 400, "message"),
    ({"system_prompt_override": 5}, 400, "system_prompt_override"),
    ({"model_provider": 5}, 400, "model_provider"),
    ({"roleplay_settings": {"enhancementModel": {"a": 1}}}, 400, "roleplay_settings.enhancementModel"),
    ({"temperature": 2.5}, 400, "temperature"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": "warm"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
]


@pytest.mark.parametrize(("body", "status", "field"), REFUSED, ids=[str(row[0])[:50] for row in REFUSED])
async def test_bad_bodies_are_refused_with_their_own_status(
    site: Site, alice: Person, body: dict[str, Any], status: int, field: str
) -> None:
    with saying(site, "yes") as model:
        answer = await chat(alice, **body)
    said = answer.json()
    assert answer.status_code == status, answer.text
    assert (said["success"], [error["field"] for error in said["errors"]]) == (False, [field] if field else [])
    assert model.read == []


async def test_a_conversation_of_somebody_else_is_not_there(site: Site, alice: Person) -> None:
    bob = await site.person()
    talk = await bob.begin()
    answer = await chat(alice, conversation_id=talk)
    assert (answer.status_code, answer.json()["code"]) == (404, "conversation_not_found")
    assert await bob.kept(talk) == []


async def test_nobody_chats_without_a_key(site: Site) -> None:
    stranger = await site.server.client()
    assert (await stranger.post(CHAT, json={"message": "hello"})).status_code == 401
    assert (await stranger.post("/v1/conversations", json={})).status_code == 401
