"""Taking over the waiting jobs of an older system's queues, through the real submission and a real Postgres."""

import asyncio
import contextlib
import io
import json
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from db.imports import Imports
from serve_app.cli.takeover import lines_of
from serve_app.messages import FOREIGN_IDS, read_message
from serve_app.takeover import Line, Outcome, Takeover
from tests.serve_app.conftest import InProcess
from tests.serve_app.running import running

TAKEN, THERE, REFUSED = Outcome.TAKEN, Outcome.THERE, Outcome.REFUSED


def pushed(user: UUID, **changes: Any) -> dict[str, Any]:
    """A message as the function pushed it last."""
    job_id = str(uuid4())
    message: dict[str, Any] = {
        "id": job_id,
        "type": "sdxl_image_fast",
        "prompt": "a lighthouse",
        "user_id": str(user),
        "config": {
            "pipeline": "txt2img",
            "num_images": 1,
            "num_inference_steps": 3,
            "guidance_scale": 5.5,
            "resolution": "1024x1024",
            "seed": 0,
        },
        "metadata": {"contentType": "sfw", "reference_type": "style", "shot_type": "wide"},
        "negative_prompt": "fog",
        "compel_enabled": False,
        "compel_weights": None,
        "job_id": job_id,
        "job_type": "sdxl_image_fast",
        "quality": "fast",
        "format": "png",
        "content_type": "sfw",
    }
    return message | changes


def older(user: UUID, job_type: str = "sdxl_image_high", **changes: Any) -> dict[str, Any]:
    """A message as the function pushed it in its first dialect: with the video model's settings, whatever the type."""
    high, video = "high" in job_type, job_type.startswith("video")
    config = {
        "size": "480*832",
        "sample_steps": 50 if high else 25,
        "sample_guide_scale": 7.5 if high else 6.5,
        "sample_solver": "euler",
        "sample_shift": 5.0,
        "frame_num": 83 if video else 1,
        "enhance_prompt": "enhanced" in job_type,
        "expected_time": 40,
        "content_type": "video" if video else "image",
        "file_extension": "mp4" if video else "png",
        "num_images": 1,
        "seed": 12,
    }
    message: dict[str, Any] = {
        "id": str(uuid4()),
        "type": job_type,
        "prompt": "a mill",
        "config": config,
        "user_id": str(user),
        "created_at": "2025-07-16T10:00:00.000Z",
        "bucket": job_type,
        "model_variant": "lustify_sdxl",
        "metadata": {"prompt": "a mill", "content_type": "video" if video else "image", "sample_shift": 5.0},
    }
    return message | changes


def dumped(*messages: Any) -> list[bytes]:
    return [json.dumps(message).encode() + b"\n" for message in messages]


async def take(server: InProcess, lines: list[bytes] | list[bytes | None], **options: Any) -> list[Line]:
    return [line async for line in Takeover(server.edge, **options).run(lines)]


def outcomes(lines: list[Line]) -> list[Outcome]:
    return [line.outcome for line in lines]


@pytest.fixture
async def owner(server: InProcess) -> UUID:
    return await server.edge.access.ensure_user("alice")


async def test_a_message_becomes_a_job_under_its_own_id(server: InProcess, owner: UUID) -> None:
    message = pushed(owner)
    assert outcomes(await take(server, dumped(message))) == [TAKEN]
    row = await server.pool.fetchrow("SELECT * FROM jobs")
    params, metadata = row["params"], row["metadata"]
    assert (str(row["id"]), row["user_id"], row["status"]) == (message["id"], owner, "queued")
    assert (row["job_type"], row["original_prompt"], row["stage"]) == ("sdxl_image_fast", "a lighthouse", "generate")
    assert (params["seed"], params["steps"], params["guidance_scale"], params["num_images"]) == (0, 3, 5.5, 1)
    assert "fog" in params["negative_prompt"]
    carried = {"contentType": "sfw", "reference_type": "style", "shot_type": "wide"}
    assert metadata == carried | {"quality": "fast", "format": "png"}
    claim = await server.claim()
    assert str(claim.job_id) == message["id"]


@pytest.mark.parametrize(
    ("job_type", "steps", "frames"),
    [("sdxl_image_high", None, None), ("video_high", None, 17), ("image_fast", None, 1)],
)
async def test_constants_of_the_first_dialect_are_no_wishes(
    server: InProcess, owner: UUID, job_type: str, steps: int | None, frames: int | None
) -> None:
    (line,) = await take(server, dumped(older(owner, job_type)))
    assert line.outcome is TAKEN, line
    row = await server.pool.fetchrow("SELECT params, metadata, adjustments FROM jobs")
    defaults = server.settings.loaded_profile.models
    family = next(spec.defaults for name, spec in defaults.items() if name == ("sdxl" if "sdxl" in job_type else "wan"))
    assert family is not None
    assert (row["params"]["width"], row["params"]["height"]) == family.size
    assert row["params"]["scheduler"] == family.scheduler
    assert (row["params"]["seed"], row["adjustments"]) == (12, [])
    assert (row["metadata"]["bucket"], row["metadata"]["created_at"]) == (job_type, "2025-07-16T10:00:00.000Z")


async def test_what_a_caller_chose_in_the_first_dialect_is_honoured_or_refused(server: InProcess, owner: UUID) -> None:
    video, image = older(owner, "video_fast"), older(owner, "sdxl_image_fast")
    video["config"] |= {"sample_steps": 4, "sample_guide_scale": 3.5, "sample_shift": 3.0}
    image["config"] |= {"sample_shift": 3.0}
    taken, refused = await take(server, dumped(video, image))
    assert (taken.outcome, refused.outcome, refused.field) == (TAKEN, REFUSED, "shift")
    params = await server.pool.fetchval("SELECT params FROM jobs")
    assert (params["steps"], params["guidance_scale"], params["shift"]) == (4, 3.5, 3.0)


async def test_an_enhanced_type_enhances_and_an_enhanced_prompt_is_not_enhanced_again(
    server: InProcess, owner: UUID
) -> None:
    again = pushed(owner)
    again["metadata"] |= {"user_requested_enhancement": True}
    lines = await take(server, dumped(older(owner, "video7b_fast_enhanced"), again))
    assert outcomes(lines) == [TAKEN, TAKEN]
    rows = await server.pool.fetch("SELECT job_type, stage FROM jobs ORDER BY job_type")
    assert [tuple(row) for row in rows] == [("sdxl_image_fast", "generate"), ("video7b_fast_enhanced", "enhance")]


async def test_bodies_of_the_function_are_read_too(server: InProcess, owner: UUID) -> None:
    camel = {
        "jobId": str(uuid4()),
        "userId": str(owner),
        "jobType": "sdxl_image_fast",
        "metadata": {"prompt": "a mill"},
    }
    snake = {"job_id": str(uuid4()), "user_id": str(owner), "job_type": "sdxl_image_fast", "prompt": "a mill"}
    asks = camel | {"jobId": str(uuid4()), "metadata": {"prompt": "a mill", "user_requested_enhancement": True}}
    assert outcomes(await take(server, dumped(camel, snake, asks))) == [TAKEN] * 3
    rows = await server.pool.fetch("SELECT original_prompt, stage FROM jobs ORDER BY stage DESC")
    assert [tuple(row) for row in rows] == [("a mill", "generate")] * 2 + [("a mill", "enhance")]


async def test_the_wrappings_of_a_message_make_no_difference(server: InProcess, owner: UUID) -> None:
    message = pushed(owner)
    text = json.dumps(message)
    wrapped = dumped(message, text, [message], [text], {"queue": "sdxl_queue", "payload": message}, {"payload": [text]})
    assert outcomes(await take(server, wrapped)) == [TAKEN] + [THERE] * 5
    assert len({read_message(line).text for line in wrapped}) == 1


async def test_the_order_of_the_file_is_the_order_of_a_user(server: InProcess, owner: UUID) -> None:
    messages = [pushed(owner) for _ in range(8)]
    await take(server, dumped(*messages))
    assert [str((await server.claim()).job_id) for _ in messages] == [message["id"] for message in messages]


async def test_the_same_file_again_takes_nothing(server: InProcess, owner: UUID) -> None:
    lines = dumped(pushed(owner), older(owner))
    await take(server, lines)
    before = await server.stored()
    again = await take(server, lines)
    assert (outcomes(again), await server.stored()) == ([THERE, THERE], before)


async def test_another_message_with_the_same_id_is_reported(server: InProcess, owner: UUID) -> None:
    message = pushed(owner)
    lines = await take(server, dumped(message, message | {"prompt": "a tower"}))
    assert [(line.outcome, line.field, line.code) for line in lines] == [
        (TAKEN, None, None),
        (REFUSED, "id", "import_conflict"),
    ]
    assert await server.pool.fetchval("SELECT original_prompt FROM jobs") == "a lighthouse"


async def test_an_id_of_a_job_of_our_own_is_reported(server: InProcess, owner: UUID) -> None:
    client = await server.user("alice")
    mine = (await client.post("/v1/jobs", json={"job_type": "sdxl_image_fast", "prompt": "mine"})).json()["id"]
    before = await server.stored()
    (line,) = await take(server, dumped(pushed(owner, id=mine, job_id=mine)))
    assert (line.outcome, line.field, line.code) == (REFUSED, "id", "id_taken")
    assert await server.stored() == before


async def test_an_erased_job_does_not_come_back(server: InProcess, owner: UUID) -> None:
    message = pushed(owner)
    await take(server, dumped(message))
    await server.edge.queue.cancel(UUID(message["id"]))
    assert await server.edge.jobs.erase(UUID(message["id"]), owner) is not None
    assert outcomes(await take(server, dumped(message))) == [THERE]
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 0


async def test_an_id_that_is_no_uuid_gets_one_that_stays(server: InProcess, owner: UUID) -> None:
    message = pushed(owner, id="job-17", job_id="job-17")
    first, again = await take(server, dumped(message, message))
    assert (first.outcome, again.outcome, first.job_id) == (TAKEN, THERE, again.job_id)
    row = await server.pool.fetchrow("SELECT id, metadata FROM jobs")
    assert row["metadata"]["imported_id"] == "job-17"
    assert str(row["id"]) == first.job_id
    assert row["id"] != FOREIGN_IDS


async def test_unknown_users_are_made_only_on_request(server: InProcess) -> None:
    stranger = uuid4()
    lines = dumped(pushed(stranger))
    before = await server.stored()
    (line,) = await take(server, lines)
    assert (line.outcome, line.field, line.code) == (REFUSED, "user_id", "unknown_user")
    assert await server.stored() == before
    assert outcomes(await take(server, lines, create_users=True)) == [TAKEN]
    principal = await server.edge.access.principal(stranger)
    assert principal is not None
    assert (principal.roles, principal.age_verified) == ({"basic_user"}, False)


async def test_a_refused_line_makes_no_user(server: InProcess) -> None:
    bad = pushed(uuid4())
    bad["config"] |= {"num_images": "5"}
    far = pushed(uuid4(), metadata={"reference_image_url": "https://127.0.0.1/x.png"})
    before = await server.stored()
    lines = await take(server, dumped(bad, far), create_users=True)
    assert [(line.outcome, line.field) for line in lines] == [(REFUSED, "num_images"), (REFUSED, "reference_image_url")]
    assert await server.stored() == before


def without(message: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in names}


USER = uuid4()
SECRET_WORD = "quincunx"
BAD: dict[str, tuple[bytes | None, str | None, str]] = {
    "no JSON": (b"{quincunx", "line", "invalid_json"),
    "no UTF-8": (b'{"id": "\xff"}', "line", "invalid_json"),
    "deep JSON": (b"[" * 200_000, "line", "invalid_json"),
    "NaN": (b'{"id": NaN}', "line", "invalid_json"),
    "a number": (b"5", "body", "type"),
    "a list of two": (b"[{}, {}]", "body", "type"),
    "a line too long": (None, "line", "body_too_large"),
    "no id": (dumped(without(pushed(USER), "id", "job_id"))[0], "id", "missing"),
    "two ids": (dumped(pushed(USER, id=str(uuid4())))[0], "job_id", "conflict"),
    "an id that is a number": (dumped(pushed(USER, id=5, job_id=5))[0], "id", "type"),
    "no user": (dumped(without(pushed(USER), "user_id"))[0], "user_id", "missing"),
    "a user that is no UUID": (dumped(pushed(USER, user_id="alice"))[0], "user_id", "type"),
    "no type": (dumped(without(pushed(USER), "type", "job_type"))[0], "job_type", "missing"),
    "an unknown type": (dumped(pushed(USER, type="best"))[0], "job_type", "unknown_job_type"),
    "a config that is text": (dumped(pushed(USER, config="x"))[0], "config", "type"),
    "metadata that is a list": (dumped(pushed(USER, metadata=[]))[0], "metadata", "type"),
    "a queue of others": (dumped({"queue": "mail", "payload": pushed(USER)})[0], "queue", "choice"),
    "an envelope with more": (dumped({"payload": pushed(USER), "delay": 5})[0], "line", "unknown"),
    "a resolution that is none": (dumped(pushed(USER, config={"resolution": "big"}))[0], "config.resolution", "type"),
    "a size that is not offered": (
        dumped(pushed(USER, config={"resolution": "999x999"}))[0],
        "width",
        "invalid_params",
    ),
    "steps as text": (dumped(pushed(USER, config={"num_inference_steps": "9"}))[0], "steps", "invalid_params"),
    "a prompt that is a number": (dumped(pushed(USER, prompt=7))[0], "prompt", "type"),
    "no prompt": (dumped(pushed(USER, prompt=None))[0], "prompt", "invalid_params"),
    "another quality": (dumped(pushed(USER, quality="high"))[0], "quality", "conflict"),
    "a start frame": (
        dumped(pushed(USER, config={"first_frame": "https://e.com/x"}))[0],
        "metadata.start_reference_url",
        "unsupported",
    ),
    "nsfw": (dumped(pushed(USER, metadata={"contentType": "nsfw"}, content_type="nsfw"))[0], "content_mode", ""),
    "what the policy refuses": (
        dumped(pushed(USER, prompt=f"{SECRET_WORD}, a nude woman having sex"))[0],
        "prompt",
        "content_sexual_in_sfw",
    ),
    "metadata of 20 kB": (dumped(pushed(USER, metadata={"x": SECRET_WORD * 2500}))[0], "metadata", "metadata"),
    "NUL in the metadata": (dumped(pushed(USER, metadata={"x": "a\0"}))[0], "metadata", "metadata"),
    "NUL in an id": (dumped(pushed(USER, id="a\0", job_id="a\0"))[0], "id", "type"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_line_is_reported_leaves_nothing_and_stops_no_other(
    server: InProcess, owner: UUID, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line, field, code = BAD[name]
    await server.edge.access.adopt_user(USER)
    good = pushed(owner)
    await take(server, dumped(good))
    before = await server.stored()
    first, bad, last = await take(server, [b"  \n", dumped(good)[0], line, dumped(good)[0]])
    assert (first.outcome, bad.outcome, last.outcome) == (THERE, REFUSED, THERE)
    assert (bad.number, bad.field) == (3, field)
    assert bad.code == code or not code
    assert await server.stored() == before
    told = str(bad) + "".join(capsys.readouterr())
    assert SECRET_WORD not in told


async def test_sexual_content_about_minors_is_refused_in_every_wrapping(server: InProcess, owner: UUID) -> None:
    message = pushed(owner, prompt="a nude 12 year old girl")
    lines = await take(server, dumped(message, [json.dumps(message)]))
    assert [(line.outcome, line.code) for line in lines] == [(REFUSED, "content_minors")] * 2
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 0


async def test_a_dry_run_writes_nothing_and_says_what_would_be(server: InProcess, owner: UUID) -> None:
    message, stranger, bad = pushed(owner), pushed(uuid4()), pushed(owner, prompt=None)
    lines = dumped(message, message, message | {"prompt": "x"}, stranger, bad)
    before = await server.stored()
    said = await take(server, lines, dry_run=True, create_users=True)
    assert outcomes(said) == [TAKEN, THERE, REFUSED, TAKEN, REFUSED]
    assert await server.stored() == before
    real = await take(server, lines, create_users=True)
    assert [(line.outcome, line.code) for line in real] == [(line.outcome, line.code) for line in said]


@pytest.mark.parametrize("place", ["begin", "accept", "end"])
async def test_an_import_that_died_is_finished_by_the_next(
    server: InProcess, owner: UUID, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Cancelled right after it has noted, accepted or ended the third of five lines."""
    messages = [pushed(owner) for _ in range(5)]
    takeover = Takeover(server.edge)
    reached, calls = asyncio.Event(), 0
    target: Any = server.edge.jobs if place == "accept" else takeover._imports
    real = getattr(target, place)

    async def stop_after(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        answer = await real(*arguments, **named)
        if calls == 3:
            reached.set()
            await asyncio.Event().wait()
        return answer

    monkeypatch.setattr(target, place, stop_after)

    async def run() -> None:
        async for _ in takeover.run(dumped(*messages)):
            pass

    task = asyncio.create_task(run())
    await asyncio.wait_for(reached.wait(), 60)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    done = 2 if place == "begin" else 3
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == done
    again = await take(server, dumped(*messages))
    assert outcomes(again) == [THERE] * done + [TAKEN] * (5 - done)
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 5
    assert await server.pool.fetchval("SELECT count(*) FROM usage_logs") == 5
    assert await server.pool.fetchval("SELECT count(*) FROM imported_jobs WHERE taken_at IS NULL") == 0
    assert [str((await server.claim()).job_id) for _ in messages] == [message["id"] for message in messages]


async def test_two_imports_of_one_file_make_each_job_once(server: InProcess, owner: UUID) -> None:
    lines = dumped(*(pushed(owner) for _ in range(12)))
    first, second = await asyncio.gather(take(server, lines), take(server, lines))
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 12
    together = outcomes(first) + outcomes(second)
    assert (together.count(TAKEN), together.count(THERE)) == (12, 12)


async def test_what_another_import_takes_in_at_this_moment_is_there(server: InProcess, owner: UUID) -> None:
    (line,) = dumped(pushed(owner))
    message = read_message(line)
    async with server.pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE jobs")  # so that the second one looks just before the first commits
        second = asyncio.create_task(take(server, [line]))
        waiting = "SELECT FROM pg_locks WHERE relation = 'jobs'::regclass AND NOT granted"
        async with asyncio.timeout(30):
            while await connection.fetchrow(waiting) is None:  # noqa: ASYNC110 (the database tells nobody)
                await asyncio.sleep(0.01)
        first = Imports(connection)
        assert await first.begin(message.job_id, message.text)
        await connection.execute(
            """INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, stage, original_prompt, params)
               VALUES ($1, $2, 'sdxl_image_fast', 'image', 'fast', 'sdxl', 'generate', 'a lighthouse', '{}')""",
            message.job_id,
            owner,
        )
        await first.end(message.job_id, message.text)
    assert outcomes(await second) == [THERE]


def test_lines_are_read_one_at_a_time_and_long_ones_skipped() -> None:
    file = io.BytesIO(b"a\n" + b"x" * 50 + b"\n" + b"y" * 10 + b"\r\n\n" + b"z" * 11)
    assert list(lines_of(file, 10)) == [b"a\n", None, b"y" * 10 + b"\r\n", b"\n", None]


async def test_the_command_tells_what_it_did(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with running(database, tmp_path) as site:
        user = await database.user()
        file = tmp_path / "dump.jsonl"
        file.write_bytes(b"".join(dumped(pushed(user), pushed(user, prompt=f"{SECRET_WORD}, having sex"))))
        rc, out, err = await site.command("import-queue", str(file), OURVIDZ_LOG_LEVEL="debug")
        assert (rc, out.split("\t")[:3]) == (1, ["2", "prompt", "content_sexual_in_sfw"])
        assert "1 taken, 0 were there already, 1 refused" in err
        assert SECRET_WORD not in out + err
        rc, out, err = await site.command("import-queue", str(file), "--json")
        said = json.loads(out)
        assert (rc, said["taken"], said["there"], said["refused"]) == (1, 0, 1, 1)
        assert [line["number"] for line in said["lines"]] == [2]
        file.write_bytes(file.read_bytes().splitlines()[0] + b"\n")
        assert (await site.command("import-queue", str(file), "--dry-run"))[0] == 0
        assert (await site.command("import-queue", str(tmp_path / "none")))[0] == 2
