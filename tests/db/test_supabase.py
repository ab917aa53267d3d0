"""A database that an auth service had first, set up as Supabase sets one up: its schema, its roles, its defaults, and a
user for us who is no superuser."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from db.erasures import Erasures
from db.migrate import migrate, migrations
from db.pool import open_pool
from deployments.erasure import Erasure
from tests.conftest import TestDatabase, with_database
from tests.serve_app.conftest import InProcess, a_job, in_process
from tests.serve_app.signing import ISSUER, JWT_SECRET, claims, shared

pytestmark = pytest.mark.asyncio(loop_scope="module")

PASSWORD = "p"
ROLES = """
DO $$
DECLARE wanted text;
BEGIN
  FOREACH wanted IN ARRAY ARRAY['anon', 'authenticated', 'service_role'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
      EXECUTE format('CREATE ROLE %I NOLOGIN NOINHERIT', wanted);
    END IF;
  END LOOP;
END $$;
CREATE ROLE "{owner}" LOGIN PASSWORD 'p' CREATEROLE CREATEDB BYPASSRLS;
CREATE ROLE "{auth}" LOGIN PASSWORD 'p' CREATEROLE NOINHERIT;
CREATE ROLE "{rest}" LOGIN PASSWORD 'p' NOINHERIT;
GRANT anon, authenticated, service_role TO "{owner}" WITH ADMIN OPTION;
GRANT anon, authenticated, service_role TO "{rest}";
"""
THE_WORKERS = 'GRANT ourvidz_worker TO "{owner}" WITH ADMIN OPTION'  # where another test's database made it already
AUTH = """
GRANT ALL ON SCHEMA public TO "{owner}";
GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES FOR ROLE "{owner}" IN SCHEMA public
  GRANT ALL ON TABLES TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES FOR ROLE "{owner}" IN SCHEMA public
  GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES FOR ROLE "{owner}" IN SCHEMA public
  GRANT ALL ON SEQUENCES TO anon, authenticated, service_role;
CREATE SCHEMA auth AUTHORIZATION "{auth}";
SET ROLE "{auth}";
CREATE TABLE auth.users (
  instance_id uuid, id uuid PRIMARY KEY, aud text, role text, email text, created_at timestamptz DEFAULT now(),
  is_anonymous boolean NOT NULL DEFAULT false);
ALTER TABLE auth.users ENABLE ROW LEVEL SECURITY;
CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS $$
  SELECT coalesce(nullif(current_setting('request.jwt.claim.sub', true), ''),
                  nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid $$;
GRANT USAGE ON SCHEMA auth TO anon, authenticated, service_role, "{owner}";
GRANT ALL ON auth.users TO "{owner}";
INSERT INTO auth.users (id, email) VALUES ('{early}', 'early@example.com');
RESET ROLE;
"""
EARLY = UUID("00000000-0000-4000-8000-00000000ea71")
RIGHTS = """
SELECT n.nspname || '.' || c.relname AS thing, '' AS part, a.grantee::regrole::text, a.privilege_type
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL aclexplode(c.relacl) a
WHERE n.nspname IN ('public', 'ourvidz', 'lora')
UNION ALL
SELECT n.nspname || '.' || c.relname, t.attname, a.grantee::regrole::text, a.privilege_type
FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL aclexplode(t.attacl) a WHERE n.nspname IN ('public', 'ourvidz', 'lora')
UNION ALL
SELECT p.oid::regprocedure::text, '', a.grantee::regrole::text, a.privilege_type
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
WHERE n.nspname IN ('public', 'ourvidz', 'lora')
UNION ALL
SELECT n.nspname, '', a.grantee::regrole::text, a.privilege_type
FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) a WHERE n.nspname IN ('ourvidz', 'lora')
"""


@dataclass
class Project:
    """A project of an auth service with our schema in it. `auth` is a connection of the service's own user, `rest` one
    of the server that speaks REST for it."""

    url: str
    names: dict[str, str]
    pool: asyncpg.Pool
    worker_pool: asyncpg.Pool
    auth: asyncpg.Connection
    rest: asyncpg.Connection
    applied: list[str]

    async def sign_up(self, user: UUID | None = None) -> UUID:
        user = user or uuid4()
        await self.auth.execute("INSERT INTO auth.users (id, email) VALUES ($1, 'a@example.com')", user)
        return user

    @asynccontextmanager
    async def speaking(self, user: UUID | None, role: str = "authenticated") -> AsyncIterator[asyncpg.Connection]:
        """A transaction as PostgREST opens one, taken back at its end."""
        transaction = self.rest.transaction()
        await transaction.start()
        try:
            said = claims(user or "", role=role)
            await self.rest.execute(
                """SELECT set_config('search_path', 'public', true), set_config('role', $1, true),
                          set_config('request.jwt.claims', $2, true), set_config('request.method', 'GET', true)""",
                role,
                json.dumps(said),
            )
            yield self.rest
        finally:
            await transaction.rollback()


def as_role(url: str, role: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{quote(role)}:{PASSWORD}@{parts.netloc.rpartition('@')[2]}"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def project(postgres_url: str) -> AsyncIterator[Project]:
    mark = uuid4().hex[:12]
    names = {name: f"{name}_{mark}" for name in ("owner", "auth", "rest")} | {"early": str(EARLY)}
    database = f"project_{mark}"
    server = await asyncpg.connect(with_database(postgres_url, "postgres"))
    await server.execute(ROLES.format(**names))
    if await server.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'ourvidz_worker')"):
        await server.execute(THE_WORKERS.format(**names))
    await server.execute(f'CREATE DATABASE "{database}"')
    whole = with_database(postgres_url, database)
    maker = await asyncpg.connect(whole)
    await maker.execute(f'GRANT CREATE ON DATABASE "{database}" TO "{names["owner"]}"')
    await maker.execute(AUTH.format(**names))
    url = as_role(whole, names["owner"])
    owner = await asyncpg.connect(url)
    applied = await migrate(owner)
    await owner.close()
    pool, worker_pool = await open_pool(url), await open_pool(url, role="ourvidz_worker")
    auth, rest = [await asyncpg.connect(as_role(whole, names[name])) for name in ("auth", "rest")]
    try:
        yield Project(url, names, pool, worker_pool, auth, rest, applied)
    finally:
        for opened in (auth, rest, pool, worker_pool, maker):
            await opened.close()
        await server.execute(f'DROP DATABASE "{database}" WITH (FORCE)')
        await server.execute(f'REVOKE ourvidz_worker FROM "{names["owner"]}" CASCADE')
        await server.execute('DROP ROLE "{owner}", "{auth}", "{rest}"'.format(**names))
        await server.close()


async def test_all_migrations_apply_without_a_superuser(project: Project) -> None:
    assert project.applied == [migration.name for migration in migrations()]
    row = await project.pool.fetchrow("SELECT rolsuper, rolname FROM pg_roles WHERE rolname = current_user")
    assert tuple(row) == (False, project.names["owner"])


async def test_rights_are_the_same_as_on_a_database_of_ours(
    project: Project, postgres_url: str, template_database: str
) -> None:
    """What a project grants by default to whoever holds its public key does not reach our tables and functions."""
    plain = await asyncpg.connect(with_database(postgres_url, template_database))
    try:
        found = []
        for connection in (project.pool, plain):
            rows = {tuple(row) for row in await connection.fetch(RIGHTS)}
            found.append({row for row in rows if row[2] in ("anon", "authenticated", "ourvidz_worker", "-")})
    finally:
        await plain.close()
    there, here = found
    assert len(here) > 200
    assert there - here == set()
    assert here - there == set()


async def test_the_projects_defaults_are_as_before(project: Project) -> None:
    rows = await project.pool.fetch(
        """SELECT d.defaclobjtype::text, count(DISTINCT a.grantee)
           FROM pg_default_acl d CROSS JOIN LATERAL aclexplode(d.defaclacl) a JOIN pg_roles r ON r.oid = a.grantee
           WHERE r.rolname IN ('anon', 'authenticated', 'service_role') AND d.defaclrole = current_user::regrole
           GROUP BY 1"""
    )
    assert {tuple(row) for row in rows} == {("r", 3), ("S", 3), ("f", 3)}
    async with project.pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("CREATE TABLE theirs (id int)")
        for right in ("SELECT", "INSERT", "TRUNCATE"):
            assert await connection.fetchval("SELECT has_table_privilege('anon', 'theirs', $1)", right)
        await transaction.rollback()


async def test_who_signed_up_earlier_has_a_profile_and_a_role(project: Project) -> None:
    assert await project.pool.fetchval("SELECT role::text FROM user_roles WHERE user_id = $1", EARLY) == "basic_user"


async def test_signing_up_makes_a_profile_and_a_role(project: Project) -> None:
    user = await project.sign_up()
    rows = await project.pool.fetch("SELECT role::text FROM user_roles WHERE user_id = $1", user)
    assert [row["role"] for row in rows] == ["basic_user"]
    assert await project.pool.fetchval("SELECT token_balance FROM profiles WHERE id = $1", user) == 100


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(project: Project, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[InProcess]:
    database: Any = TestDatabase(project.url, project.pool, project.worker_pool)
    changes = {"jwt_secret": JWT_SECRET, "jwt_issuer": ISSUER}
    async with in_process(database, tmp_path_factory.mktemp("project"), **changes) as opened:
        yield opened


async def test_a_user_works_from_sign_up_to_the_end_of_a_job(project: Project, server: InProcess) -> None:
    alice, bob = await project.sign_up(), await project.sign_up()
    client, other = await server.client(shared(claims(alice))), await server.client(shared(claims(bob)))
    body = {"jobType": "sdxl_image_fast", "metadata": {"prompt": "a mill"}}
    said = (await client.post("/functions/v1/queue-job", json=body)).json()
    job = said.get("jobId") or said["job_id"]
    assert (await client.get(f"/v1/jobs/{job}")).json()["status"] == "queued"
    assert (await other.get(f"/v1/jobs/{job}")).status_code == 404
    assert (await other.post(f"/v1/jobs/{job}/cancel")).status_code == 404
    claim = await server.claim()
    assert str(claim.job_id) == job
    assert (await client.post(f"/v1/jobs/{job}/cancel")).status_code == 200
    # and over REST, as the project's own clients read
    for user, seen in ((alice, 1), (bob, 0)):
        async with project.speaking(user) as connection:
            assert await connection.fetchval("SELECT count(*) FROM jobs WHERE id = $1", UUID(job)) == seen
            assert await connection.fetchval("SELECT auth.uid() = ourvidz.uid()")


async def test_rest_shows_the_own_rows_and_changes_none(project: Project, server: InProcess) -> None:
    alice, admin = await project.sign_up(), await project.sign_up()
    await project.pool.execute("INSERT INTO user_roles (user_id, role) VALUES ($1, 'admin')", admin)
    client = await server.client(shared(claims(alice)))
    assert (await client.post("/v1/jobs", json=a_job())).status_code == 202
    async with project.speaking(alice) as connection:
        assert {row["user_id"] for row in await connection.fetch("SELECT user_id FROM jobs")} == {alice}
        assert [row["id"] for row in await connection.fetch("SELECT id FROM profiles")] == [alice]
    async with project.speaking(admin) as connection:
        assert alice in {row["user_id"] for row in await connection.fetch("SELECT user_id FROM jobs")}
    for user in (alice, admin):
        for statement in (
            "UPDATE jobs SET status = 'completed'",
            "UPDATE jobs SET metadata = '{}'",
            "UPDATE jobs SET moderation_status = 'approved'",
            "UPDATE profiles SET token_balance = 1000000",
            "INSERT INTO user_roles (user_id, role) SELECT ourvidz.uid(), 'admin'",
            "SELECT key_hash FROM api_keys",
            "TRUNCATE jobs CASCADE",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with project.speaking(user) as connection:
                    await connection.execute(statement)
    # a right on some columns is no right on the others
    async with project.speaking(alice) as connection:
        await connection.execute(
            "INSERT INTO projects (user_id, original_prompt, media_type) VALUES ($1, 'a', 'image')", alice
        )
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("UPDATE projects SET user_id = user_id")


async def test_the_public_key_reads_and_calls_nothing(project: Project) -> None:
    for statement in (
        "SELECT * FROM jobs",
        "SELECT * FROM profiles",
        "SELECT * FROM model_performance_logs",
        "SELECT get_system_stats(7)",
        "SELECT * FROM schema_migrations",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with project.speaking(None, "anon") as connection:
                await connection.fetch(statement)


async def test_a_user_who_is_deleted_there_is_erased_here(project: Project, server: InProcess) -> None:
    user = await project.sign_up()
    client = await server.client(shared(claims(user)))
    job = (await client.post("/v1/jobs", json=a_job())).json()
    await server.blobs.put("workspace-temp", f"{user}/a/1/0.png", b"x", "image/png")
    await project.auth.execute("DELETE FROM auth.users WHERE id = $1", user)
    answer = await client.get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (401, "user_erased")
    assert await Erasure(Erasures(project.worker_pool), server.blobs).resume() == 1
    for table in ("profiles", "jobs"):
        column = "id" if table == "profiles" else "user_id"
        assert await project.pool.fetchval(f"SELECT count(*) FROM {table} WHERE {column} = $1", user) == 0  # noqa: S608
    assert await project.pool.fetchval("SELECT count(*) FROM job_queue WHERE job_id = $1", UUID(job["id"])) == 0
    assert [file async for file in server.blobs.list("workspace-temp", str(user))] == []
    entry = await project.pool.fetchrow(
        "SELECT * FROM user_activity_log WHERE action = 'user.erased' AND resource_id = $1", str(user)
    )
    assert entry["user_id"] is None


async def test_users_of_ours_alone_are_no_concern_of_the_auth_service(project: Project) -> None:
    """There is no key to auth.users: holders of API keys need no account there."""
    database: Any = TestDatabase(project.url, project.pool, project.worker_pool)
    user = await database.user("operator", "admin")
    assert await project.pool.fetchval("SELECT count(*) FROM auth.users WHERE id = $1", user) == 0
    stranger = await project.sign_up()
    await project.pool.execute("DELETE FROM profiles WHERE id = $1", stranger)
    await project.auth.execute("DELETE FROM auth.users WHERE id = $1", stranger)
    assert await project.pool.fetchval("SELECT count(*) FROM erasures WHERE user_id = $1", stranger) == 0
