"""What must be true before the first request: a migrated database, its seed rows, and a first admin key."""

import asyncio
import contextlib
import os
from pathlib import Path

import asyncpg
import structlog

from db.access import Access
from db.migrate import migrate
from db.offers import Offers
from db.pool import CONNECTION_FAULTS, DatabaseUnavailable, open_pool
from db.prompts import Prompts
from deployments.prompting import negative_rows, template_rows
from deployments.settings import Settings
from serve_app.seeds import offered

log = structlog.get_logger()

ADMIN = "admin"


async def prepare(settings: Settings) -> list[str]:
    """Migrate and seed; returns the migrations applied now. Waits while another process does the same.

    Raises `DatabaseUnavailable`, `MigrationError`.
    """
    url = await asyncio.to_thread(settings.postgres)
    try:
        connection = await asyncpg.connect(url, timeout=10)
    except CONNECTION_FAULTS as error:
        raise DatabaseUnavailable(f"can't connect to Postgres: {type(error).__name__}") from error
    try:
        applied = await migrate(connection)
    finally:
        await connection.close()
    pool = await open_pool(url, max_size=2)
    try:
        await Prompts(pool).seed(template_rows(), negative_rows())
        await Offers(pool).seed(offered())
    finally:
        await pool.close()
    if applied:
        log.info("migrated", applied=len(applied))
    return applied


async def ensure_admin_key(settings: Settings) -> str:
    """The admin key of a laptop, kept in the state folder so that the command line finds it; made when missing.

    Where nobody can administer the system yet, this is how the first admin comes to be.
    """
    path = admin_key_file(settings)
    url = await asyncio.to_thread(settings.postgres)
    pool = await open_pool(url, max_size=2)
    try:
        access = Access(pool)
        if path.exists():
            kept = path.read_text().strip()
            if await access.authenticate(kept) is not None:
                return kept
        user = await access.ensure_user(ADMIN, "admin")
        key = await access.create_key(user, "laptop")
        assert key.secret is not None
    finally:
        await pool.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key.secret + "\n")
    return key.secret


def admin_key_file(settings: Settings) -> Path:
    """Where the laptop's admin key is kept."""
    return settings.state_dir / "admin-key"
