"""The command line as a process: exit codes, what goes to stdout and what to stderr."""

import asyncio
import json
import os
import pty
import signal
import socket
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from typer.testing import CliRunner

from db.access import Access
from serve_app.api.wire import Job, JobRequest
from serve_app.cli import app
from serve_app.cli.installation import masked_url
from serve_app.cli.progress import state_of
from serve_app.cli.terminal import clean
from serve_app.client import Client, short_id
from tests.serve_app.running import Site, run_command, running, start_command

PROMPT = "a very particular lighthouse"


def bare(tmp_path: Path, **more: str) -> dict[str, str]:
    """An environment without an installation."""
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OURVIDZ_STATE_DIR": str(tmp_path / "state")} | more


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("up", "serve", "demo", "down", "submit", "jobs", "keys", "migrate", "doctor", "config", "openapi"):
        assert f" {command} " in result.output


def test_unknown_command_is_usage() -> None:
    assert CliRunner().invoke(app, ["paint"]).exit_code == 2


async def test_version_is_data(tmp_path: Path) -> None:
    code, out, err = await run_command("version", "--json", environment=bare(tmp_path))
    assert (code, err) == (0, "")
    assert set(json.loads(out)) >= {"ourvidz-serve", "python", "ray", "torch"}


async def test_nobody_to_connect_to_exits_with_3(tmp_path: Path, unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    code, out, err = await run_command("jobs", "list", "--url", url, environment=bare(tmp_path))
    assert (code, out) == (3, "")
    assert "is the cluster running?" in err


async def test_wrong_address_exits_with_2(tmp_path: Path) -> None:
    code, out, _ = await run_command("jobs", "list", "--url", "localhost:8000", environment=bare(tmp_path))
    assert (code, out) == (2, "")


async def test_submit_prints_the_id_and_nothing_else(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        code, out, err = await site.command(
            "submit", "sdxl_image_fast", PROMPT, "-p", "seed=7", "-p", "scheduler=euler"
        )
        row = await database.pool.fetchrow("SELECT id, original_prompt, params FROM jobs")
    assert (code, UUID(out.strip())) == (0, row["id"])
    assert (row["original_prompt"], row["params"]["seed"], row["params"]["scheduler"]) == (PROMPT, 7, "euler")
    assert PROMPT not in err


async def test_submit_reads_the_prompt_from_stdin(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        code, out, _ = await site.command("submit", "sdxl_image_fast", "-", "--json", give=PROMPT + "\n")
    assert (code, json.loads(out)["prompt"]) == (0, PROMPT)


async def test_submit_says_what_was_adjusted(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        code, _, err = await site.command("submit", "video_fast", PROMPT, "-p", "frames=83")
    assert code == 0
    assert "frames: 81 instead of 83" in err


async def test_submit_with_one_key_twice_makes_one_job(database: Any, tmp_path: Path) -> None:
    arguments = ("submit", "sdxl_image_fast", PROMPT, "--idempotency-key", "k1")
    async with running(database, tmp_path) as site:
        first, again = [await site.command(*arguments) for _ in range(2)]
    assert first[:2] == again[:2]
    assert "used before" in again[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["submit", "sdxl_image_fast", PROMPT, "-p", "nonsense=1"], "NAME=VALUE"),
        (["submit", "sdxl_image_fast", PROMPT, "-p", "seed=seven"], "not a JSON value"),
        (["submit", "sdxl_image_fast", PROMPT, "-p", "seed=1.5"], "seed"),
        (["submit", "sdxl_image_fast", PROMPT, "-p", "steps=1000"], "steps"),
        (["submit", "oil_painting", PROMPT], "job_type"),
    ],
)
async def test_submit_of_a_wrong_request_exits_with_2(
    database: Any, tmp_path: Path, arguments: list[str], told: str
) -> None:
    async with running(database, tmp_path) as site:
        code, out, err = await site.command(*arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert PROMPT not in err
    assert await database.pool.fetchval("SELECT count(*) FROM jobs") == 0


async def test_submit_out_waits_and_prints_the_files(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        command = asyncio.create_task(site.command("submit", "sdxl_image_fast", PROMPT, "--out", str(tmp_path / "out")))
        data = await site.finish(await site.claim())
        code, out, err = await command
    assert code == 0, err
    (path,) = (tmp_path / "out").iterdir()
    assert (out, path.read_bytes()) == (f"{path}\n", data)
    assert "completed in 1.5 s, 1 file" in err
    assert PROMPT not in err


async def test_submit_wait_prints_urls_that_work_without_a_key(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        command = asyncio.create_task(site.command("submit", "sdxl_image_fast", PROMPT, "--wait"))
        await site.finish(await site.claim())
        code, out, _ = await command
    assert code == 0
    assert out.startswith(f"{site.url}/v1/files/workspace-temp/")


async def test_submit_wait_of_a_job_that_fails_exits_with_1(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        command = asyncio.create_task(site.command("submit", "sdxl_image_fast", PROMPT, "--wait", "--json"))
        await site.fail(await site.claim())
        code, out, err = await command
    assert (code, json.loads(out)["error"]["code"]) == (1, "oom")
    assert "failed: oom" in err


async def test_interrupted_wait_says_how_to_cancel_and_cancels_nothing(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        process = await start_command("submit", "sdxl_image_fast", PROMPT, "--wait", environment=site.environment)
        assert process.stderr is not None
        line = await asyncio.wait_for(process.stderr.readline(), 60)
        assert b"queued" in line
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 60)
        (job,) = (await client.list_jobs()).data
    assert (process.returncode, out, job.status) == (130, b"", "queued")
    assert f"ourvidz jobs cancel {job.id}" in err.decode()


async def test_jobs_list_is_tab_separated_when_piped(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        job = await submitted(site)
        code, out, _ = await site.command("jobs", "list", "--status", "queued")
    head, line = out.splitlines()
    assert (code, head.split("\t")[:3]) == (0, ["id", "type", "status"])
    assert line.split("\t")[:3] == [str(job.id), "sdxl_image_fast", "queued"]


async def test_jobs_list_is_a_table_on_a_terminal(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        await submitted(site)
        code, shown = await on_a_terminal(site.environment | {"COLUMNS": "200", "TERM": "xterm"}, "jobs", "list")
        plain = await on_a_terminal(site.environment | {"COLUMNS": "200", "NO_COLOR": "1"}, "jobs", "list")
    assert code == 0
    assert "\t" not in shown
    assert "\x1b[" in shown
    assert "\x1b[3" not in plain[1]  # no colour, though a terminal


async def test_jobs_show_takes_the_end_of_an_id(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        job = await submitted(site)
        code, out, _ = await site.command("jobs", "show", short_id(job.id), "--json")
        text = await site.command("jobs", "show", str(job.id))
    assert (code, json.loads(out)["id"]) == (0, str(job.id))
    assert f"prompt:      {PROMPT}" in text[1]


async def test_jobs_show_of_no_such_job_fails(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        short = await site.command("jobs", "show", "ffffffff")
        whole = await site.command("jobs", "show", str(UUID(int=1)))
    assert (short[0], short[1]) == (2, "")
    assert (whole[0], whole[1]) == (1, "")
    assert "job_not_found" in whole[2]


async def test_jobs_cancel_and_retry_print_what_became_of_them(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        first, second = await submitted(site), await submitted(site)
        cancelled = await site.command("jobs", "cancel", short_id(first.id), short_id(second.id), "--json")
        retried = await site.command("jobs", "retry", short_id(first.id), "--json")
        refused = await site.command("jobs", "retry", short_id(first.id))
    assert [job["status"] for job in json.loads(cancelled[1])] == ["cancelled", "cancelled"]
    assert json.loads(retried[1])["status"] == "queued"
    assert (refused[0], "not_retryable" in refused[2]) == (1, True)


async def test_jobs_cancel_of_a_wrong_id_among_others_changes_nothing(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        job = await submitted(site)
        code, _, _ = await site.command("jobs", "cancel", str(job.id), "ffffffff")
        assert code == 2
        assert await database.pool.fetchval("SELECT status FROM jobs") == "queued"


async def test_jobs_watch_shows_steps_a_line_each_when_piped(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        job, worker = await submitted(site), UUID(int=7)
        process = await start_command("jobs", "watch", str(job.id), environment=site.environment)
        assert process.stderr is not None
        claim = await site.claim(job.id, worker)
        await site.step(claim, worker, 8, 15)
        lines = []
        while "denoise 8/15" not in (line := (await asyncio.wait_for(process.stderr.readline(), 60)).decode()):
            assert line, lines
            lines.append(line)
        await site.finish(claim)
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert out.decode().startswith(f"{site.url}/v1/files/")
    assert "completed in 1.5 s" in err.decode()
    assert "\x1b" not in err.decode()


async def test_keys_created_here_open_the_api_until_revoked(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        code, out, err = await site.command("keys", "create", "carol", "--role", "premium_user")
        key = out.strip()
        assert (code, key in err) == (0, False)
        assert (await site.command("jobs", "list", OURVIDZ_API_KEY=key))[0] == 0
        listed = json.loads((await site.command("keys", "list", "--user", "carol", "--json"))[1])
        assert [(entry["username"], entry["prefix"]) for entry in listed] == [("carol", key[:10])]
        assert key not in str(listed)
        assert (await site.command("keys", "revoke", listed[0]["prefix"]))[0] == 0
        refused = await site.command("jobs", "list", OURVIDZ_API_KEY=key)
    assert (refused[0], "OURVIDZ_API_KEY" in refused[2]) == (1, True)
    principal = await Access(database.pool).authenticate(key)
    assert principal is None


async def test_keys_create_refuses_an_unknown_role(database: Any, tmp_path: Path) -> None:
    environment = bare(tmp_path, DATABASE_URL=database.url)
    code, out, err = await run_command("keys", "create", "eve", "--role", "emperor", environment=environment)
    assert (code, out, "premium_user" in err) == (2, "", True)


async def test_keys_on_an_empty_database_say_to_migrate(postgres_url: str, tmp_path: Path) -> None:
    code, _, err = await run_command("keys", "list", environment=bare(tmp_path, DATABASE_URL=postgres_url))
    assert (code, "ourvidz migrate" in err) == (1, True)


async def test_database_that_is_not_there_exits_with_3(tmp_path: Path) -> None:
    environment = bare(tmp_path, DATABASE_URL="postgresql://u:hunter2@127.0.0.1:1/d")
    code, out, err = await run_command("keys", "list", environment=environment)
    assert (code, out, "hunter2" in err) == (3, "", False)


async def test_migrate_applies_what_is_missing_once(postgres_url: str, database: Any, tmp_path: Path) -> None:
    environment = bare(tmp_path, DATABASE_URL=database.url)
    await database.pool.execute("DROP SCHEMA public, ourvidz, lora CASCADE")
    await database.pool.execute("CREATE SCHEMA public")
    before = await run_command("migrate", "--status", "--json", environment=environment)
    assert (before[0], json.loads(before[1])["pending"][0]) == (1, "0001_access.sql")
    first = await run_command("migrate", "--json", environment=environment)
    assert (first[0], json.loads(first[1])["applied"][0]) == (0, "0001_access.sql")
    again = await run_command("migrate", environment=environment)
    assert (again[0], again[1]) == (0, "")
    after = await run_command("migrate", "--status", environment=environment)
    assert (after[0], "pending" in after[1]) == (0, False)


async def test_doctor_reports_as_json_and_fails_with_1(database: Any, tmp_path: Path) -> None:
    well = await run_command("doctor", "--json", environment=bare(tmp_path, DATABASE_URL=database.url))
    assert (well[0], well[2]) == (0, "")
    assert {finding["level"] for finding in json.loads(well[1])} <= {"ok", "warn"}
    ill = await run_command("doctor", environment=bare(tmp_path, DATABASE_URL="postgresql://u@127.0.0.1:1/d"))
    assert ill[0] == 1
    assert "fail\tpostgres\t" in ill[1]
    assert "Check DATABASE_URL" in ill[2]


async def test_config_show_masks_secrets_and_names_their_source(tmp_path: Path) -> None:
    environment = bare(
        tmp_path,
        DATABASE_URL="postgresql://u:hunter2@db:5432/d?sslpassword=hunter3",
        OURVIDZ_SIGNING_SECRET="kJ8sd7fHq2LmZx0vB5nTr9wYc3Pg6aUe",
        OURVIDZ_EGRESS_ALLOW="http://10.0.0.7:9000,https://10.0.0.8:443",
    )
    code, out, err = await run_command("config", "show", "--json", environment=environment)
    shown = {row["name"]: (row["value"], row["source"]) for row in json.loads(out)}
    assert (code, err) == (0, "")
    assert "hunter" not in out
    assert "kJ8sd7" not in out
    assert shown["database_url"] == ("postgresql://u:***@db:5432/d?***", "DATABASE_URL")
    assert shown["signing_secret"][1] == "OURVIDZ_SIGNING_SECRET"
    assert shown["egress_allow"][0] == ["http://10.0.0.7:9000", "https://10.0.0.8:443"]
    assert shown["profile"] == ("laptop", "default")


@pytest.mark.parametrize(("name", "value"), [("OURVIDZ_LEASE_SECONDS", "hunter2"), ("OURVIDZ_PROFILE", "mainframe")])
async def test_wrong_setting_exits_with_2_and_names_it(tmp_path: Path, name: str, value: str) -> None:
    code, out, err = await run_command("config", "show", environment=bare(tmp_path) | {name: value})
    assert (code, out) == (2, "")
    assert (name in err and value not in err) if "LEASE" in name else "laptop" in err


async def test_openapi_is_the_document(tmp_path: Path) -> None:
    code, out, _ = await run_command("openapi", environment=bare(tmp_path))
    document = json.loads(out)
    assert (code, document["openapi"][:2]) == (0, "3.")
    assert {"/v1/jobs", "/v1/keys"} <= set(document["paths"])
    assert not (tmp_path / "state").exists()


async def test_up_on_a_port_in_use_says_so(tmp_path: Path, database: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = bare(tmp_path, DATABASE_URL=database.url)
        code, out, err = await run_command("up", "--port", port, environment=environment)
    assert (code, out) == (1, "")
    assert f"port {port}" in err


async def test_demo_at_a_cluster_that_does_not_allow_the_receiver_is_refused(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        code, out, err = await site.command("demo", "--url", site.url, "--out", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert "url_refused" in err


async def test_serve_without_a_config_is_usage(tmp_path: Path) -> None:
    wide = bare(tmp_path, COLUMNS="400")  # or the name may be broken at the end of a line
    code, _, err = await run_command("serve", str(tmp_path / "none.yaml"), environment=wide)
    assert (code, "none.yaml" in err) == (2, True)


@pytest.mark.parametrize("text", ["a: [", "just text", "applications: []"])
async def test_serve_of_what_is_no_config_is_usage(tmp_path: Path, text: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    code, out, err = await run_command("serve", str(config), environment=bare(tmp_path))
    assert (code, out, "no Serve config" in err) == (2, "", True)


async def test_down_leaves_a_postgres_of_ones_own_alone(tmp_path: Path, database: Any) -> None:
    code, _, err = await run_command("down", environment=bare(tmp_path, DATABASE_URL=database.url))
    assert (code, "does not stop" in err) == (2, True)
    assert await database.pool.fetchval("SELECT 1") == 1


async def test_down_without_a_server_is_fine(tmp_path: Path) -> None:
    code, _, err = await run_command("down", environment=bare(tmp_path))
    assert (code, "was not running" in err) == (0, True)


def test_what_others_wrote_can_not_steer_the_terminal() -> None:
    assert clean("a\x1b[2Jb\nc\x07") == "a [2Jb c "


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p@h:5432/d", "postgresql://u:***@h:5432/d"),
        ("postgresql://u@/d?host=/tmp/x&password=p", "postgresql://u@/d?***"),
        ("postgresql://h/d", "postgresql://h/d"),
    ],
)
def test_masked_url_keeps_what_is_no_secret(url: str, shown: str) -> None:
    assert masked_url(url) == shown


def test_state_of_a_queued_job_says_how_many_are_ahead() -> None:
    job = Job.model_construct(
        status="queued", stage="generate", position=3, eta_seconds=75.0, failures=1, max_attempts=3
    )
    assert state_of(job) == "queued for generate, 3 ahead, about 1:15 min, failed 1 of 3 times"


async def submitted(site: Site) -> Job:
    async with Client(site.endpoint) as client:
        request = JobRequest.model_validate({"job_type": "sdxl_image_fast", "prompt": PROMPT})
        return (await client.submit(request)).job


async def on_a_terminal(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Run the command with a terminal for stdout; its exit code and what appeared there."""
    ours, theirs = pty.openpty()
    program = str(Path(sys.executable).with_name("ourvidz"))
    process = await asyncio.create_subprocess_exec(program, *arguments, stdout=theirs, env=environment)
    os.close(theirs)
    code = await asyncio.wait_for(process.wait(), 60)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # what Linux answers when the other end is closed
        pass
    os.close(ours)
    return code, shown.decode()


async def test_watch_into_a_folder_that_can_not_be_made_exits_with_2(database: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with running(database, tmp_path) as site:
        code, out, err = await site.command("jobs", "watch", "0", "--out", str(tmp_path / "file" / "out"))
    assert (code, out) == (2, "")
    assert "no files can be put there" in err
    assert "Traceback" not in err
