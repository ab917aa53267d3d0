"""/v1/conversations over real Postgres and a real tiny language model: what is kept, whose it is, what is left out."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
import pytest_asyncio
import uvicorn

from models.generation import GenerationFailed, ModelLoadFailed
from models.writing.language import Answer, Completion, LanguageModelBusy, Message, Sampling
from serve_app import answer as answering
from serve_app.api.problems import Problem
from serve_app.chat import Turn
from tests.serve_app.conftest import InProcess
from tests.serve_app.language import Handle, events, refused, talking, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SHORT = {"max_tokens": 24, "seed": 5}
SSE = {"Accept": "text/event-stream"}
PROFILE = """
name: adults
description: a laptop that may make nsfw content, with a small cache
laptop: true
nsfw_allowed: true
models:
  qwen: {model_name: tiny-qwen, source: tiny, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0.01,
         sequences: 4, cache_tokens: 2048}
"""


@dataclass
class Site:
    """The API with a language model."""

    server: InProcess
    handle: Handle

    async def person(self, **profile: Any) -> "Person":
        """A new user."""
        name = f"user-{uuid4().hex[:8]}"
        client = await self.server.user(name, profile.pop("role", "basic_user"))
        user_id = await self.server.pool.fetchval("SELECT id FROM profiles WHERE username = $1", name)
        if profile.pop("adult", False):
            await self.server.pool.execute("UPDATE profiles SET age_verified = true WHERE id = $1", user_id)
        return Person(self, client, user_id)


@dataclass
class Person:
    """A user with a client."""

    site: Site
    client: httpx2.AsyncClient
    id: UUID

    async def begin(self, **body: Any) -> str:
        """A new conversation."""
        answer = await self.client.post("/v1/conversations", json=body)
        assert answer.status_code == 201, answer.text
        assert answer.headers["location"] == f"/v1/conversations/{answer.json()['id']}"
        return str(answer.json()["id"])

    async def say(self, conversation: str, content: str = "hello", **changes: Any) -> httpx2.Response:
        """Send a message."""
        headers = changes.pop("headers", {})
        body = SHORT | {"content": content} | changes
        return await self.client.post(f"/v1/conversations/{conversation}/messages", json=body, headers=headers)

    async def kept(self, conversation: str) -> list[tuple[str, str]]:
        """The messages in the database."""
        rows = await self.site.server.pool.fetch(
            "SELECT sender, content FROM messages WHERE conversation_id = $1 ORDER BY seq", UUID(conversation)
        )
        return [tuple(row) for row in rows]

    async def character(self, **columns: Any) -> str:
        """A character of this user."""
        values = {"user_id": self.id, "name": "Ada", "description": "a painter of harbours"} | columns
        names, places = ", ".join(values), ", ".join(f"${n}" for n in range(1, len(values) + 1))
        made = await self.site.server.pool.fetchval(
            f"INSERT INTO characters ({names}) VALUES ({places}) RETURNING id",  # noqa: S608
            *values.values(),
        )
        return str(made)


class Scripted:
    """A language model that says what it is told to, a few characters at a time; or fails."""

    model_name, revision, device, loaded, broken = "scripted", None, "cpu", True, None

    def __init__(self, text: str, error: Exception | None = None, fails_after: int | None = None) -> None:
        self.text, self.error, self.fails_after = text, error, fails_after
        self.read: list[Sequence[Message]] = []

    def submit(self, messages: Sequence[Message], sampling: Sampling, priority: str = "chat") -> Answer:
        """An answer that is written already."""
        self.read.append(messages)
        if self.error is not None and self.fails_after is None:
            raise self.error
        answer = Answer("chat", lambda answer: None)
        text = self.text if self.fails_after is None else self.text[: self.fails_after]
        for start in range(0, len(text), 7):
            answer.advance(text[start : start + 7], start)
        failed = self.error if self.fails_after is not None else None
        answer.end(failed or Completion(self.text, 3, len(self.text), 0.0, "stop"))  # type: ignore[arg-type]
        return answer

    def close(self) -> None:
        """Nothing to close."""


class Waiting(Scripted):
    """A language model whose answers the test writes."""

    def __init__(self) -> None:
        super().__init__("")
        self._begun: asyncio.Queue[Answer] = asyncio.Queue()
        self.stopped: list[bool] = []

    def submit(self, messages: Sequence[Message], sampling: Sampling, priority: str = "chat") -> Answer:
        """An answer without a word yet."""
        answer = Answer("chat", self._stop)
        self._begun.put_nowait(answer)
        return answer

    def _stop(self, answer: Answer) -> None:
        if not answer.done:
            self.stopped.append(True)
            answer.end(Completion(answer.text, 3, 0, 0.0, "cancelled"))

    async def submitted(self) -> Answer:
        """The next answer that was asked for."""
        return await self._begun.get()

    async def speak(self, words: str) -> None:
        """Write these words into the next answer, and more will come."""
        (await self.submitted()).advance(words, len(words))


@contextmanager
def asked(site: Site) -> Iterator[Waiting]:
    """Put a waiting model in the place of the tiny one."""
    enhancer, waiting = site.handle.enhancer, Waiting()
    before, enhancer.model = enhancer.model, waiting  # type: ignore[assignment]
    try:
        yield waiting
    finally:
        enhancer.model = before


@asynccontextmanager
async def on_a_socket(app: Any) -> AsyncIterator[str]:
    """The app, which has begun its life already, on a free port of 127.0.0.1."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            while not server.started:
                assert not serving.done(), "the API did not start"
                await asyncio.sleep(0)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


@contextmanager
def saying(site: Site, text: str = "", **options: Any) -> Iterator[Scripted]:
    """Put a scripted model in the place of the tiny one."""
    enhancer, scripted = site.handle.enhancer, Scripted(text, **options)
    before, enhancer.model = enhancer.model, scripted  # type: ignore[assignment]
    try:
        yield scripted
    finally:
        enhancer.model = before


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(shared_database: Any, tmp_path_factory: pytest.TempPathFactory, state_dir: Path) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "profile.yaml").write_text(PROFILE)
    profile = str(folder / "profile.yaml")
    async with talking(shared_database, folder, state_dir=state_dir, profile=profile) as (server, handle):
        yield Site(server, handle)


@pytest_asyncio.fixture(loop_scope="module")
async def alice(site: Site) -> Person:
    return await site.person()


# ------------------------------------------------------------------------------------------ a message and its answer


async def test_a_message_is_answered_and_both_are_kept(site: Site, alice: Person) -> None:
    talk = await alice.begin(title="Light")
    answer = await alice.say(talk, "What light\nsuits a harbour?")
    said = answer.json()
    assert answer.status_code == 200
    assert await alice.kept(talk) == [
        ("user", "What light\nsuits a harbour?"),
        ("assistant", said["answer"]["content"]),
    ]
    assert (said["model"], said["seed"], said["max_tokens"], said["use_case"]) == ("tiny-qwen", 5, 24, "chat_general")
    assert said["history"] == {"used": 0, "left_out": 0, "counted_by": "tokenizer"}
    assert (said["template"]["name"], said["template"]["misfit"], said["content_mode"]) == ("CHAT_GENERAL", None, "sfw")
    assert 0 < said["new_tokens"] <= 24
    assert said["prompt_tokens"] > len("What light suits a harbour?")
    assert site.handle.asked[-1][2] == "sfw"


async def test_the_model_reads_the_history_in_its_order(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with saying(site, "the first answer") as first:
        await alice.say(talk, "one")
    with saying(site, "the second answer") as model:
        answer = await alice.say(talk, "two")
    assert [message.role for message in first.read[0]] == ["system", "user"]
    assert [(message.role, message.content) for message in model.read[0]][1:] == [
        ("user", "one"),
        ("assistant", "the first answer"),
        ("user", "two"),
    ]
    assert answer.json()["history"]["used"] == 2


async def test_the_oldest_history_is_left_out_first_and_that_is_told(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    for number in range(4):
        with saying(site, f"answer {number} " + "x" * 300):
            assert (await alice.say(talk, f"question {number} " + "y" * 300)).status_code == 200
    with saying(site, "short") as model:
        said = (await alice.say(talk, "and now?")).json()
    read = model.read[0]
    # 2048 tokens, a byte each in the tiny vocabulary: two exchanges of 620 fit beside the system prompt
    assert said["history"] == {"used": 4, "left_out": 4, "counted_by": "tokenizer"}
    assert [message.content.split(" y")[0].split(" x")[0] for message in read[1:]] == [
        "question 2",
        "answer 2",
        "question 3",
        "answer 3",
        "and now?",
    ]


async def test_the_real_model_takes_what_the_budget_lets_through(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    for _ in range(3):
        with saying(site, "x" * 500):
            await alice.say(talk, "y" * 500)
    answer = await alice.say(talk, "and now?", max_tokens=1)
    assert answer.status_code in (200, 502), answer.text  # random weights may say nothing in one token
    said = (await alice.say(talk, "z" * 500, max_tokens=64)).json()
    assert said["history"]["left_out"] > 0
    assert said["prompt_tokens"] + 64 <= 2048


async def test_a_model_that_reads_less_gets_less_history(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    for number in range(3):
        with saying(site, "x" * 100):
            await alice.say(talk, f"question {number}")
    model = site.handle.enhancer.model
    before = model.context  # type: ignore[union-attr]
    model.context = 1000  # type: ignore[union-attr]
    try:
        said = (await alice.say(talk, "and now? " + "y" * 80, max_tokens=150)).json()
    finally:
        model.context = before  # type: ignore[union-attr]
    assert (said["history"]["used"], said["history"]["left_out"]) == (2, 4)


async def test_a_message_that_leaves_no_room_is_refused(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    assert refused(await alice.say(talk, "y" * 2000)) == (422, "message_too_long")
    assert await alice.kept(talk) == []


async def test_a_seed_gives_the_same_words_again(alice: Person) -> None:
    said = [(await alice.say(await alice.begin(), seed=9)).json()["answer"]["content"] for _ in range(2)]
    other = (await alice.say(await alice.begin(), seed=10)).json()["answer"]["content"]
    assert said[0] == said[1] != other


# ------------------------------------------------------------------------------------------------------- in pieces


async def test_pieces_joined_are_the_message_that_is_kept(alice: Person) -> None:
    talk = await alice.begin()
    answer = await alice.say(talk, max_tokens=400, headers=SSE)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    told = events(answer.text)
    assert [name for name, _ in told[:-1]] == ["piece"] * (len(told) - 1)
    assert len(told) >= 3
    assert told[-1][0] == "message"
    said = json.loads(told[-1][1])
    assert "".join(json.loads(data)["text"] for _, data in told[:-1]) == said["answer"]["content"]
    assert (await alice.kept(talk))[1] == ("assistant", said["answer"]["content"])


async def test_what_can_be_refused_is_refused_before_the_stream(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    assert refused(await alice.say(talk, "y" * 2000, headers=SSE)) == (422, "message_too_long")
    with saying(site, error=ModelLoadFailed("away")):
        assert refused(await alice.say(talk, headers=SSE)) == (503, "language_model_unavailable")


async def test_a_failure_in_the_stream_is_an_event_and_nothing_is_kept(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with saying(site, "some words that come before it breaks " * 9, error=GenerationFailed("x"), fails_after=200):
        told = events((await alice.say(talk, headers=SSE)).text)
    assert told[0][0] == "piece"
    assert (told[-1][0], json.loads(told[-1][1])["code"]) == ("error", "language_model_failed")
    assert await alice.kept(talk) == []


# ---------------------------------------------------------------------------------------------- without an answer


@pytest.mark.parametrize(
    ("error", "refusal", "retry"),
    [
        (ModelLoadFailed("away"), (503, "language_model_unavailable"), "5"),
        (LanguageModelBusy("full", 7.2), (503, "model_busy"), "8"),
        (GenerationFailed("broke"), (502, "language_model_failed"), None),
    ],
)
async def test_a_failure_keeps_nothing(
    site: Site, alice: Person, error: Exception, refusal: tuple[int, str], retry: str | None
) -> None:
    talk = await alice.begin()
    with saying(site, error=error):
        answer = await alice.say(talk)
    assert refused(answer) == refusal
    assert answer.headers.get("retry-after") == retry
    assert await alice.kept(talk) == []


async def test_silence_is_no_answer(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with saying(site, " "):
        assert refused(await alice.say(talk)) == (502, "empty_answer")
    assert await alice.kept(talk) == []


async def test_an_answer_has_a_time_limit(site: Site, alice: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "ANSWER_SECONDS", 0.0)
    talk, before = await alice.begin(), site.handle.cancelled
    assert refused(await alice.say(talk, max_tokens=1000)) == (504, "answer_timeout")
    assert site.handle.cancelled == before + 1
    await site.handle.settled()
    assert await alice.kept(talk) == []


async def test_a_conversation_deleted_meanwhile_takes_no_answer(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with asked(site) as model:
        sending = asyncio.create_task(alice.say(talk))
        answer = await model.submitted()
        assert (await alice.client.delete(f"/v1/conversations/{talk}")).status_code == 204
        answer.advance("too late", 2)
        answer.end(Completion("too late", 3, 2, 0.0, "stop"))
        assert refused(await sending) == (404, "conversation_not_found")
    assert await alice.kept(talk) == []


async def test_two_messages_at_once_keep_their_exchanges_together(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with saying(site, "yes"):
        await asyncio.gather(*(alice.say(talk, f"question {number}") for number in range(5)))
    senders = [sender for sender, _ in await alice.kept(talk)]
    assert senders == ["user", "assistant"] * 5


# -------------------------------------------------------------------------------------------------- who goes away


async def test_a_reader_who_leaves_stops_the_model_and_nothing_is_kept(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with asked(site) as model:
        async with on_a_socket(site.server.app) as url:
            async with httpx2.AsyncClient(base_url=url, headers=alice.client.headers, timeout=30) as client:
                path = f"/v1/conversations/{talk}/messages"
                speaking = asyncio.create_task(model.speak("words " * 30))
                async with client.stream("POST", path, json={"content": "hello"}, headers=SSE) as stream:
                    assert await anext(stream.aiter_lines()) == "event: piece"
                    await speaking
            await until(lambda: bool(site.handle.closing))
            await site.handle.settled()
    assert await alice.kept(talk) == []
    assert model.stopped == [True]


async def test_a_reader_who_leaves_after_the_last_word_leaves_both_messages(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    async with site.server.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM conversations WHERE id = $1 FOR UPDATE", UUID(talk))
        with saying(site, "every word of it"):
            sending = asyncio.create_task(alice.say(talk))
            await until(lambda: bool(answering._storing))
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
    await until(lambda: not answering._storing)
    assert await alice.kept(talk) == [("user", "hello"), ("assistant", "every word of it")]


# ------------------------------------------------------------------------------------------------ the content policy

MINOR = "tell me about a nude child"
ADULT = "two adults have sex"


async def test_a_message_that_breaks_the_policy_never_reaches_the_model(site: Site, alice: Person) -> None:
    talk, before = await alice.begin(), len(site.handle.asked)
    assert refused(await alice.say(talk, MINOR)) == (422, "content_minors")
    assert refused(await alice.say(talk, ADULT)) == (422, "content_sexual_in_sfw")
    assert len(site.handle.asked) == before
    assert await alice.kept(talk) == []


async def test_the_policy_holds_in_nsfw_mode_too(site: Site) -> None:
    adult = await site.person(adult=True)
    talk = await adult.begin()
    assert refused(await adult.say(talk, MINOR, content_mode="nsfw")) == (422, "content_minors")
    with saying(site, "a quiet answer"):
        assert (await adult.say(talk, ADULT, content_mode="nsfw")).json()["template"]["content_mode"] == "nsfw"


async def test_nsfw_mode_needs_an_age_verified_user(alice: Person) -> None:
    answer = await alice.say(await alice.begin(), content_mode="nsfw")
    assert refused(answer) == (403, "age_not_verified")


async def test_what_was_said_before_counts_as_well(site: Site) -> None:
    adult = await site.person(adult=True)
    talk = await adult.begin()
    with saying(site, "a quiet answer"):
        assert (await adult.say(talk, "let us talk about a 10 year old")).status_code == 200
    before = len(site.handle.asked)
    assert refused(await adult.say(talk, ADULT, content_mode="nsfw")) == (422, "content_minors")
    assert (len(await adult.kept(talk)), len(site.handle.asked)) == (2, before)


async def test_an_answer_that_breaks_the_policy_is_not_kept(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with saying(site, "there was a nude child"):
        assert refused(await alice.say(talk)) == (422, "content_minors")
    with saying(site, "and then " + ADULT):
        assert refused(await alice.say(talk)) == (422, "content_sexual_in_sfw")
    assert await alice.kept(talk) == []


async def test_a_stream_that_breaks_the_policy_stops_before_the_word(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with saying(site, "a calm beginning of the story " * 10 + MINOR + " and it goes on" * 20):
        told = events((await alice.say(talk, headers=SSE)).text)
    shown = "".join(json.loads(data)["text"] for name, data in told if name == "piece")
    assert shown.startswith("a calm beginning")
    assert "nude" not in shown
    assert (told[-1][0], json.loads(told[-1][1])["code"]) == ("error", "content_minors")
    assert await alice.kept(talk) == []


async def test_a_stream_is_judged_with_all_that_was_said_before_it(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with saying(site, "how nice"):
        assert (await alice.say(talk, "tell me of a ten year old child named Ada")).status_code == 200
    before = len(await alice.kept(talk))
    with saying(site, "a calm beginning of the story " * 10 + "she wears lingerie and is seductive, " * 9):
        told = events((await alice.say(talk, "go on", headers=SSE)).text)
    assert "lingerie" not in "".join(data for name, data in told if name == "piece")
    assert (told[-1][0], json.loads(told[-1][1])["code"]) == ("error", "content_minors")
    assert len(await alice.kept(talk)) == before


@pytest.mark.parametrize("place", ["history", "written_by_people", "message"])
async def test_a_piece_is_judged_with_what_it_answers(place: str) -> None:
    child = "a ten year old child"
    said: dict[str, Any] = {"history": (Message("user", child),), "written_by_people": (child,), "message": child}
    guard = answering.Guard(replace(a_turn(), **{place: said[place]}))
    with pytest.raises(Problem, match="minors"):
        await guard.add("she wears lingerie and is seductive, " * 3)


def a_turn() -> Turn:
    """A question with nothing before it."""
    return Turn(
        message="how did they find the way?",
        mode="sfw",
        system="",
        history=(),
        written_by_people=(),
        sampling=Sampling(9),
        store_in=uuid4(),
        key=None,
        account={},
    )


async def test_a_word_that_is_not_whole_yet_is_not_judged() -> None:
    guard, beginning = answering.Guard(a_turn()), "the captain stood at the rail all night and in the morning took his "
    assert await guard.add(beginning + "sex") == beginning
    assert await guard.add("tant out of its box") == ""
    assert await guard.whole() == (beginning + "sextant out of its box", "sextant out of its box")
    with pytest.raises(Problem):
        await answering.Guard(a_turn()).add(beginning + "sex ")


async def test_a_script_without_spaces_is_not_held_back_for_ever() -> None:
    guard = answering.Guard(a_turn())
    assert await guard.add("灯台" * 50) == ""
    assert await guard.add("灯台" * 50) == "灯台" * 100


async def test_a_refusal_of_the_model_is_kept_word_for_word(site: Site, alice: Person) -> None:
    talk, text = await alice.begin(), "I'm sorry, but I can't help with that request."
    with saying(site, text):
        await alice.say(talk)
    assert (await alice.kept(talk))[1] == ("assistant", text)


async def test_titles_are_under_the_policy(alice: Person) -> None:
    assert refused(await alice.client.post("/v1/conversations", json={"title": MINOR})) == (422, "content_minors")
    talk = await alice.begin()
    answer = await alice.client.patch(f"/v1/conversations/{talk}", json={"title": MINOR})
    assert refused(answer) == (422, "content_minors")
    assert answer.json()["errors"][0]["field"] == "title"


async def test_a_title_may_be_what_a_message_of_its_user_may_be(site: Site, alice: Person) -> None:
    adult = await site.person(adult=True)
    for title in (ADULT, "the school of a 10 year old"):
        assert await adult.begin(title=title)
    assert refused(await adult.client.post("/v1/conversations", json={"title": MINOR})) == (422, "content_minors")
    assert refused(await alice.client.post("/v1/conversations", json={"title": ADULT})) == (
        422,
        "content_sexual_in_sfw",
    )


# ---------------------------------------------------------------------------------------------------- characters


async def test_a_character_speaks(site: Site, alice: Person) -> None:
    ada = await alice.character(mood="calm", forbidden_phrases=["as an AI"])
    talk = await alice.begin(character_id=ada)
    with saying(site, "I paint") as model:
        said = (await alice.say(talk)).json()
    system = model.read[0][0].content
    assert system.startswith("You are Ada and speak to the user.")
    assert "a painter of harbours" in system
    assert "Never say: as an AI" in system
    assert "{{" not in system
    assert (said["use_case"], said["template"]["name"]) == ("character_roleplay", "CHARACTER_ROLEPLAY")
    assert "scene_context" in said["template"]["unfilled"]


async def test_a_character_of_somebody_else_is_not_there(site: Site, alice: Person) -> None:
    bob = await site.person()
    hidden, shown = await bob.character(), await bob.character(is_public=True)
    answer = await alice.client.post("/v1/conversations", json={"character_id": hidden})
    assert refused(answer) == (404, "character_not_found")
    assert await alice.begin(character_id=shown)


async def test_what_a_character_is_counts_for_the_policy(site: Site, alice: Person) -> None:
    talk = await alice.begin(character_id=await alice.character(description="a nude child"))
    before = len(site.handle.asked)
    assert refused(await alice.say(talk)) == (422, "content_minors")
    assert len(site.handle.asked) == before


async def test_an_nsfw_character_needs_nsfw_mode(site: Site) -> None:
    adult = await site.person(adult=True)
    talk = await adult.begin(character_id=await adult.character(content_rating="nsfw"))
    assert refused(await adult.say(talk)) == (422, "conflict")
    with saying(site, "good evening"):
        assert (await adult.say(talk, content_mode="nsfw")).status_code == 200


# ------------------------------------------------------------------------------------------------------ templates


async def test_an_operators_edit_of_a_template_is_in_force_at_once(site: Site, alice: Person) -> None:
    change = "UPDATE prompt_templates SET system_prompt = $1 WHERE template_name = 'CHAT_CREATIVE'"
    before = await site.server.pool.fetchval(
        "SELECT system_prompt FROM prompt_templates WHERE template_name = 'CHAT_CREATIVE' AND content_mode = 'sfw'"
    )
    talk = await alice.begin(conversation_type="creative")
    await site.server.pool.execute(change, "Speak like a sailor.")
    try:
        with saying(site, "ahoy") as model:
            await alice.say(talk)
    finally:
        await site.server.pool.execute(change, before)
    assert model.read[0][0].content == "Speak like a sailor."


async def test_another_template_may_stand_in_and_that_is_told(site: Site, alice: Person) -> None:
    talk = await alice.begin(conversation_type="creative")
    switch = "UPDATE prompt_templates SET is_active = $1 WHERE use_case = ANY ($2)"
    await site.server.pool.execute(switch, False, ["chat_creative"])
    try:
        with saying(site, "yes"):
            assert (await alice.say(talk)).json()["template"]["misfit"] == "use_case"
        await site.server.pool.execute(switch, False, ["chat_general"])
        assert refused(await alice.say(talk)) == (503, "no_template_available")
    finally:
        await site.server.pool.execute(switch, True, ["chat_creative", "chat_general"])


async def test_an_nsfw_template_is_not_for_sfw(site: Site, alice: Person) -> None:
    found = "SELECT id FROM prompt_templates WHERE template_name = 'CHAT_CREATIVE' AND content_mode = $1"
    safe, other = [str(await site.server.pool.fetchval(found, mode)) for mode in ("sfw", "nsfw")]
    talk = await alice.begin()
    assert refused(await alice.say(talk, template_id=other)) == (422, "conflict")
    with saying(site, "yes"):
        assert (await alice.say(talk, template_id=safe)).json()["template"]["name"] == "CHAT_CREATIVE"
    picture = str(await site.server.pool.fetchval("SELECT id FROM prompt_templates WHERE template_name = 'SDXL_FAST'"))
    for template_id in (picture, str(uuid4())):
        assert refused(await alice.say(talk, template_id=template_id)) == (404, "template_not_found")


async def test_the_admins_chat_is_for_admins(site: Site, alice: Person) -> None:
    wanted = {"conversation_type": "admin"}
    assert refused(await alice.client.post("/v1/conversations", json=wanted)) == (403, "admin_only")
    found = "SELECT id FROM prompt_templates WHERE template_name = 'CHAT_ADMIN' AND content_mode = 'sfw'"
    template_id = str(await site.server.pool.fetchval(found))
    assert refused(await alice.say(await alice.begin(), template_id=template_id)) == (403, "admin_only")
    root = await site.person(role="admin")
    with saying(site, "look at the queue"):
        assert (await root.say(await root.begin(**wanted))).json()["template"]["name"] == "CHAT_ADMIN"


# ---------------------------------------------------------------------------------------------------- the same key


async def test_a_key_keeps_one_exchange(site: Site, alice: Person) -> None:
    talk, key = await alice.begin(), {"Idempotency-Key": "k"}
    with saying(site, "once") as model:
        first = await alice.say(talk, headers=key)
        again = await alice.say(talk, headers=key)
        streamed = events((await alice.say(talk, headers=key | SSE)).text)
        other = await alice.say(talk, "something else", headers=key)
    assert first.json() == again.json() == json.loads(streamed[-1][1])
    assert ("idempotency-replayed" in first.headers, again.headers["idempotency-replayed"]) == (False, "true")
    assert refused(other) == (422, "idempotency_key_reused")
    assert (len(model.read), len(await alice.kept(talk))) == (1, 2)


async def test_a_key_used_twice_at_once_keeps_one_exchange(site: Site, alice: Person) -> None:
    talk, key = await alice.begin(), {"Idempotency-Key": "k"}
    with asked(site) as model:
        sending = [asyncio.create_task(alice.say(talk, headers=key)) for _ in range(2)]
        answers = [await model.submitted() for _ in sending]  # both are under way before one of them is kept
        for number, answer in enumerate(answers):
            answer.advance(f"words {number}", 2)
            answer.end(Completion(f"words {number}", 3, 2, 0.0, "stop"))
        said = [await one for one in sending]
    assert sorted(one.status_code for one in said) == [200, 409]
    assert len(await alice.kept(talk)) == 2


async def test_a_key_is_its_users_own(site: Site, alice: Person) -> None:
    bob, key = await site.person(), {"Idempotency-Key": "k"}
    with saying(site, "words"):
        said = [(await one.say(await one.begin(), headers=key)).json() for one in (alice, bob)]
    assert said[0]["answer"]["id"] != said[1]["answer"]["id"]


# ------------------------------------------------------------------------------------------------- whose they are


async def test_a_conversation_of_somebody_else_is_not_there(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    path = f"/v1/conversations/{talk}"
    for stranger in (await site.person(), await site.person(role="moderator"), await site.person(role="admin")):
        client = stranger.client
        for answer in (
            await client.get(path),
            await client.patch(path, json={"title": "mine"}),
            await client.delete(path),
            await client.get(f"{path}/messages"),
            await stranger.say(talk),
        ):
            assert refused(answer) == (404, "conversation_not_found")
        assert (await client.get("/v1/conversations")).json()["data"] == []
    assert (await alice.client.get(path)).json()["title"] == "New Conversation"
    assert await alice.kept(talk) == []


async def test_conversations_come_by_their_last_message(site: Site, alice: Person) -> None:
    talks = [await alice.begin(title=f"talk {number}") for number in range(3)]
    with saying(site, "yes"):
        await alice.say(talks[0])
    page = (await alice.client.get("/v1/conversations?limit=2")).json()
    assert [one["id"] for one in page["data"]] == [talks[0], talks[2]]
    assert (page["has_more"], page["data"][0]["messages"]) == (True, 2)
    rest = (await alice.client.get(f"/v1/conversations?before={page['last_id']}")).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == ([talks[1]], False)


async def test_a_conversation_is_renamed_put_away_and_deleted(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    path = f"/v1/conversations/{talk}"
    with saying(site, "yes"):
        await alice.say(talk, headers={"Idempotency-Key": "k"})
    changed = (await alice.client.patch(path, json={"title": "Act two", "status": "archived"})).json()
    assert (changed["title"], changed["status"]) == ("Act two", "archived")
    assert (await alice.client.get("/v1/conversations?status=active")).json()["data"] == []
    assert (await alice.client.delete(path)).status_code == 204
    assert refused(await alice.client.get(path)) == (404, "conversation_not_found")
    assert await alice.kept(talk) == []
    assert await site.server.pool.fetchval("SELECT count(*) FROM message_keys WHERE user_id = $1", alice.id) == 0


async def test_messages_come_in_pages(site: Site, alice: Person) -> None:
    talk = await alice.begin()
    with saying(site, "yes"):
        for number in range(3):
            await alice.say(talk, f"question {number}")
    path = f"/v1/conversations/{talk}/messages"
    page = (await alice.client.get(f"{path}?limit=3")).json()
    assert ([one["content"] for one in page["data"]], page["has_more"]) == (["yes", "question 2", "yes"], True)
    before = (await alice.client.get(f"{path}?before={page['first_id']}")).json()
    assert [one["content"] for one in before["data"]] == ["question 0", "yes", "question 1"]
    after = (await alice.client.get(f"{path}?after={before['first_id']}&limit=2")).json()
    assert ([one["content"] for one in after["data"]], after["has_more"]) == (["yes", "question 1"], True)
    both = await alice.client.get(f"{path}?before={page['first_id']}&after={page['first_id']}")
    assert refused(both) == (422, "conflict")


# ---------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"content": ""},
        {"content": " \n\u200b"},
        {"content": 5},
        {"content": "a\u0000"},
        {"content": "y" * 8001},
        {"content": "x", "max_tokens": 0},
        {"content": "x", "max_tokens": 1025},
        {"content": "x", "temperature": 3},
        {"content": "x", "temperature": True},
        {"content": "x", "top_p": "0.5"},
        {"content": "x", "top_p": 0},
        {"content": "x", "seed": -1},
        {"content": "x", "template_id": "best"},
        {"content": "x", "content_mode": "all"},
        {"content": "x", "system": "y"},
    ],
)
async def test_a_bad_message_is_refused(site: Site, alice: Person, body: dict[str, Any]) -> None:
    talk, before = await alice.begin(), len(site.handle.asked)
    answer = await alice.client.post(f"/v1/conversations/{talk}/messages", json=body)
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == 1
    assert len(site.handle.asked) == before


@pytest.mark.parametrize(
    "body",
    [
        {"title": ""},
        {"title": "a\nb"},
        {"title": "y" * 201},
        {"conversation_type": "best"},
        {"character_id": "x"},
        {"user_id": str(uuid4())},
    ],
)
async def test_a_bad_conversation_is_refused(alice: Person, body: dict[str, Any]) -> None:
    assert (await alice.client.post("/v1/conversations", json=body)).status_code == 422
    assert (await alice.client.get("/v1/conversations")).json()["data"] == []


async def test_a_project_must_be_ones_own(site: Site, alice: Person) -> None:
    made = "INSERT INTO projects (user_id, original_prompt, media_type) VALUES ($1, 'p', 'image') RETURNING id"
    bob = await site.person()
    own, other = [str(await site.server.pool.fetchval(made, person.id)) for person in (alice, bob)]
    answer = await alice.client.post("/v1/conversations", json={"project_id": other})
    assert refused(answer) == (404, "project_not_found")
    assert await alice.begin(project_id=own)


async def test_without_a_cluster_there_is_no_answer(site: Site, alice: Person) -> None:
    edge = site.server.edge
    site.server.app.state.edge = replace(edge, enhancer=None)
    talk = await alice.begin()
    try:
        answer = await alice.say(talk)
    finally:
        site.server.app.state.edge = edge
    assert refused(answer) == (503, "language_model_unavailable")
    assert answer.headers["retry-after"] == "5"
    assert await alice.kept(talk) == []
