"""Moderation in the database: what follows what, what others see, and what a race leaves."""

import asyncio
import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from db.jobs import Jobs, Status
from db.library import LibraryRows, Position
from db.moderation import Moderation, Result
from db.pool import as_user
from db.queue import Queue, Settlement
from tests.db.test_queue import asset, new_job


class Gallery:
    """One user with finished jobs, another one, and a moderator."""

    def __init__(self, database: Any, alice: UUID, bob: UUID, mod: UUID) -> None:
        self.pool, self.worker_pool = database.pool, database.worker_pool
        self.alice, self.bob, self.mod = alice, bob, mod
        self.rows, self.moderation = LibraryRows(database.pool), Moderation(database.pool)

    async def made(self, images: int = 1, **values: Any) -> list[UUID]:
        """The assets of a new job."""
        job = new_job(self.alice)
        await Jobs(self.pool).accept(job)
        await Queue(self.worker_pool).claim("sdxl", uuid4(), 1)
        assets = [asset(job.id, 1, index) for index in range(images)]
        if values:
            assets = [type(one)(**{**vars(one), **values}) for one in assets]
        end = Settlement(job_id=job.id, attempt=1, status=Status.COMPLETED, assets=assets)
        assert await Queue(self.worker_pool).settle([end])
        return [one.id for one in assets]

    async def saved(self, asset_id: UUID, visibility: str = "private", mode: str = "sfw") -> UUID:
        """The item of an asset."""
        row = await self.rows.asset(asset_id)
        assert row is not None
        item = uuid4()
        assert await self.rows.save(item, row, f"{self.alice}/saved/{item}.png", None)
        await self.pool.execute(
            """UPDATE user_library SET visibility = $2,
                 generation_metadata = generation_metadata || jsonb_build_object('content_mode', $3::text)
               WHERE id = $1""",
            item,
            visibility,
            mode,
        )
        return item

    async def status(self, table: str, key: UUID) -> str:
        """The moderation status of a row."""
        value: str = await self.pool.fetchval(f"SELECT moderation_status FROM {table} WHERE id = $1", key)  # noqa: S608
        return value

    async def job_of(self, asset_id: UUID) -> Any:
        return await self.pool.fetchrow(
            "SELECT j.* FROM jobs j JOIN workspace_assets a ON a.job_id = j.id WHERE a.id = $1", asset_id
        )

    async def mode(self, name: str) -> None:
        await self.pool.execute("UPDATE system_config SET config = $1", {"moderation": name})

    async def decide(self, key: UUID, status: Any, **values: Any) -> Any:
        return await self.moderation.review(key, status, self.mod, **values)

    async def public(self, viewer: UUID | None = None) -> list[UUID]:
        """What another user finds among what is public."""
        async with as_user(self.pool, viewer or self.bob) as connection:
            return [row.id for row in await self.moderation.published_page(connection, page_size=50)]

    async def opens(self, item: UUID, viewer: UUID | None = None) -> bool:
        """Whether another user who knows the id of an item sees it."""
        async with as_user(self.pool, viewer or self.bob) as connection:
            return await self.moderation.published(connection, item) is not None

    async def waiting(self, viewer: UUID | None = None, **values: Any) -> list[Result]:
        async with as_user(self.pool, viewer or self.mod) as connection:
            return await self.moderation.list_page(connection, **({"page_size": 50} | values))


@pytest.fixture
async def gallery(database: Any) -> Gallery:
    return Gallery(
        database,
        await database.user("alice"),
        await database.user("bob"),
        await database.user("mod", "moderator"),
    )


# --------------------------------------------------------------------------------------------- what follows what


async def test_what_is_made_is_pending_and_so_is_its_job(gallery: Gallery) -> None:
    (one,) = await gallery.made()
    assert await gallery.status("workspace_assets", one) == "pending"
    job = await gallery.job_of(one)
    assert (job["moderation_status"], job["reviewed_at"], job["reviewed_by"]) == ("pending", None, None)


async def test_what_a_classifier_said_is_written_with_the_end_of_the_job(gallery: Gallery) -> None:
    (one,) = await gallery.made(moderation_status="flagged", moderation_reason="classifier:logo")
    row = await gallery.rows.asset(one)
    assert row is not None
    assert (row.moderation_status, row.moderation_reason) == ("flagged", "classifier:logo")
    assert (await gallery.job_of(one))["moderation_status"] == "flagged"


async def test_a_job_has_the_gravest_status_of_what_it_made(gallery: Gallery) -> None:
    first, second = await gallery.made(2)
    seen = []
    for key, status in ((first, "approved"), (second, "approved"), (first, "rejected"), (second, "flagged")):
        await gallery.decide(key, status)
        seen.append((await gallery.job_of(first))["moderation_status"])
    await gallery.decide(first, "approved")
    seen.append((await gallery.job_of(first))["moderation_status"])
    assert seen == ["pending", "approved", "rejected", "rejected", "flagged"]


async def test_a_decision_is_in_the_job_in_the_reviews_and_in_the_log(gallery: Gallery) -> None:
    (one,) = await gallery.made()
    assert await gallery.decide(one, "rejected", reason="likeness", notes="a known face") == ("pending", True)
    job = await gallery.job_of(one)
    assert (job["reviewed_by"], job["review_notes"]) == (gallery.mod, "a known face")
    assert job["reviewed_at"] is not None
    async with as_user(gallery.pool, gallery.mod) as connection:
        found = await gallery.moderation.read(connection, one)
    assert found is not None
    assert [(r.reviewer, r.was, r.status, r.reason, r.notes) for r in found[1]] == [
        (gallery.mod, "pending", "rejected", "likeness", "a known face")
    ]
    log = await gallery.pool.fetchrow("SELECT * FROM user_activity_log WHERE action = 'asset.rejected'")
    assert (log["user_id"], log["resource_id"]) == (gallery.mod, str(one))
    assert "face" not in json.dumps(log["metadata"])


@pytest.mark.parametrize("decided_on", ["asset", "item"])
async def test_a_decision_holds_for_all_copies(gallery: Gallery, decided_on: str) -> None:
    (one,) = await gallery.made()
    item = await gallery.saved(one)
    await gallery.decide(one if decided_on == "asset" else item, "rejected", reason="likeness")
    assert await gallery.status("workspace_assets", one) == "rejected"
    assert await gallery.status("user_library", item) == "rejected"
    kept = await gallery.rows.item(item)
    assert kept is not None
    assert await gallery.rows.discard(one, gallery.alice)
    again, job = uuid4(), uuid4()
    facts = {"job_type": "sdxl_image_fast", "quality": "fast", "model_type": "sdxl", "content_mode": "sfw"}
    assert await gallery.rows.copy_back(
        kept, facts | {"metadata": {}}, asset_id=again, job_id=job, key="c/0.png", thumbnail_key=None
    )
    assert await gallery.status("workspace_assets", again) == "rejected", "a copy has the status of its source"
    assert await gallery.status("jobs", job) == "rejected"
    await gallery.decide(again, "approved")
    assert await gallery.status("user_library", item) == "approved"


async def test_a_decision_about_what_is_gone_changes_nothing(gallery: Gallery) -> None:
    assert await gallery.decide(uuid4(), "approved") is None
    (one,) = await gallery.made()
    await gallery.rows.discard(one, gallery.alice)
    assert await gallery.decide(one, "approved") is None
    assert await gallery.pool.fetchval("SELECT count(*) FROM moderation_reviews") == 0
    assert await gallery.pool.fetchval("SELECT count(*) FROM user_activity_log") == 0


# -------------------------------------------------------------------------------------------------- publication


async def test_others_see_what_is_approved_and_published_alone(gallery: Gallery) -> None:
    items = {
        (status, visibility): await gallery.saved((await gallery.made(moderation_status=status))[0], visibility)
        for status in ("pending", "approved", "rejected", "flagged")
        for visibility in ("private", "unlisted", "public")
    }
    assert await gallery.public() == [items["approved", "public"]]
    opened = {case for case, item in items.items() if await gallery.opens(item)}
    assert opened == {("approved", "unlisted"), ("approved", "public")}
    async with as_user(gallery.pool, gallery.bob) as connection:
        assert await connection.fetch("SELECT * FROM user_library") == [], "the rows themselves are their owner's"
    async with as_user(gallery.pool, gallery.alice) as connection:
        assert len(await connection.fetch("SELECT * FROM user_library")) == len(items), "whatever their status"


async def test_a_rejection_withdraws_at_once(gallery: Gallery) -> None:
    (one,) = await gallery.made()
    item = await gallery.saved(one, "public")
    await gallery.decide(item, "approved")
    assert await gallery.public() == [item]
    await gallery.decide(one, "rejected")
    assert await gallery.public() == []
    assert not await gallery.opens(item)


async def test_nsfw_items_are_for_the_age_verified(gallery: Gallery) -> None:
    (one,) = await gallery.made()
    item = await gallery.saved(one, "public", mode="nsfw")
    await gallery.decide(item, "approved")
    assert await gallery.public() == []
    await gallery.pool.execute("UPDATE profiles SET age_verified = true WHERE id = $1", gallery.bob)
    assert await gallery.public() == [item]


async def test_what_is_published_does_not_tell_the_words_it_was_made_from(gallery: Gallery) -> None:
    columns = await gallery.pool.fetch(
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'published_items'"
    )
    names = {row["column_name"] for row in columns}
    assert "title" in names
    assert not names & {"original_prompt", "generation_metadata", "user_id", "source_job_id"}


async def test_with_moderation_off_only_what_was_judged_is_held_back(gallery: Gallery) -> None:
    unseen, failed, rejected = [
        await gallery.saved((await gallery.made(**values))[0], "public")
        for values in (
            {},
            {"moderation_reason": "classifier_failed"},
            {"moderation_status": "rejected", "moderation_reason": "classifier:logo"},
        )
    ]
    assert await gallery.public() == []
    await gallery.mode("off")
    assert await gallery.public() == [unseen], "a classifier that failed approves nothing, whatever the mode"
    assert not await gallery.opens(failed)
    assert not await gallery.opens(rejected)
    await gallery.mode("nonsense")
    assert await gallery.public() == [], "a mode that is not known is the stricter one"


# ------------------------------------------------------------------------------------------------------- the queue


async def test_what_waits_depends_on_the_mode(gallery: Gallery) -> None:
    quiet, wanted, flagged, failed = [
        (await gallery.made(**values))[0]
        for values in (
            {},
            {},
            {"moderation_status": "flagged", "moderation_reason": "classifier:logo"},
            {"moderation_reason": "classifier_failed"},
        )
    ]
    item = await gallery.saved(wanted, "unlisted")
    assert {row.id for row in await gallery.waiting()} == {item, flagged, failed}
    await gallery.mode("all")
    assert {row.id for row in await gallery.waiting()} == {quiet, item, flagged, failed}
    await gallery.mode("off")
    assert {row.id for row in await gallery.waiting()} == {item, flagged, failed}
    assert {row.id for row in await gallery.waiting(status="flagged")} == {flagged}
    assert {row.id for row in await gallery.waiting(status="pending")} == {quiet, item, failed}


async def test_pages_follow_one_another_although_rows_go(gallery: Gallery) -> None:
    ids = [(await gallery.made(moderation_status="flagged"))[0] for _ in range(5)]
    ids[3] = await gallery.saved(ids[3])
    rows = await gallery.pool.fetch(
        """SELECT id FROM (SELECT id, created_at FROM workspace_assets UNION ALL
                           SELECT id, created_at FROM user_library) r WHERE id = ANY ($1) ORDER BY created_at, id""",
        ids,
    )
    expected = [row["id"] for row in rows]
    first = await gallery.waiting(page_size=2)
    await gallery.decide(first[0].id, "approved")
    after = Position.parse(str(first[-1].position))
    second = await gallery.waiting(page_size=2, after=after)
    third = await gallery.waiting(page_size=2, after=second[-1].position)
    assert [row.id for row in [*first, *second, *third]] == expected


async def test_row_level_security_shows_a_user_the_own_results_only(gallery: Gallery) -> None:
    (one,) = await gallery.made(moderation_status="rejected")
    for viewer, seen in ((gallery.alice, [one]), (gallery.bob, []), (gallery.mod, [one])):
        assert [row.id for row in await gallery.waiting(viewer, status="rejected")] == seen
    await gallery.decide(one, "flagged", notes="look again")
    async with as_user(gallery.pool, gallery.alice) as connection:
        assert await connection.fetch("SELECT * FROM moderation_reviews") == []
    async with as_user(gallery.pool, gallery.mod) as connection:
        assert len(await connection.fetch("SELECT * FROM moderation_reviews")) == 1


# -------------------------------------------------------------------------------------------------------- races


async def test_of_two_moderators_who_saw_the_same_one_decides(gallery: Gallery) -> None:
    (one,) = await gallery.made()
    answers = await asyncio.gather(
        gallery.decide(one, "approved", expected="pending"), gallery.decide(one, "rejected", expected="pending")
    )
    assert sorted(done for _, done in answers) == [False, True]
    winner = "approved" if answers[0][1] else "rejected"
    assert await gallery.status("workspace_assets", one) == winner
    assert [was for was, done in answers if not done] == [winner]
    assert await gallery.pool.fetchval("SELECT count(*) FROM moderation_reviews") == 1


async def test_a_save_under_way_does_not_escape_a_rejection(gallery: Gallery) -> None:
    (one,) = await gallery.made()
    row = await gallery.rows.asset(one)
    assert row is not None
    item = uuid4()
    async with gallery.pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            """INSERT INTO user_library (id, user_id, source_asset_id, asset_type, storage_path, file_size_bytes,
                                         mime_type, original_prompt, model_used)
               VALUES ($1, $2, $3, 'image', 'a/b.png', 1, 'image/png', 'p', 'm')""",
            item,
            gallery.alice,
            one,
        )
        deciding = asyncio.create_task(gallery.decide(one, "rejected"))
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        async with asyncio.timeout(30):
            while not await connection.fetchval(waits):
                await connection.execute("SELECT pg_stat_clear_snapshot()")
        await transaction.commit()
    assert await deciding == ("pending", True)
    assert await gallery.status("user_library", item) == "rejected"
