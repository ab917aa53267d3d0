"""The documentation against the code: generated parts are fresh; links, commands, settings and examples are real."""

import http.client
import importlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from typer.main import get_command

from db.callbacks import Delivery
from deployments.callbacks import CallbackSecrets
from deployments.settings import Settings
from models.profile import ModelSpec, Profile
from serve_app.api.wire import JobRequest
from serve_app.cli import app as command_line

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
OTHER_VARIABLES = {"OURVIDZ_LOG_LEVEL", "OURVIDZ_URL", "OURVIDZ_API_KEY", "OURVIDZ_TEST_DATABASE_URL"}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, without their indentation."""
    found = []
    for indent, kind, body in FENCE.findall(TEXTS[page]):
        if kind == language:
            found.append("".join(line.removeprefix(indent) for line in body.splitlines(keepends=True)))
    return found


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", TEXTS[page])


# --- generated parts --------------------------------------------------------------------------------------


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[Path, str]]:
    """Every generated page as the code says it should be."""
    monkeypatch.syspath_prepend(str(DOCS))
    before = set(sys.modules)
    yield importlib.import_module("generate").pages()
    for name in set(sys.modules) - before:
        if (DOCS / f"{name}.py").exists():
            del sys.modules[name]


def test_generated_parts_are_what_the_code_says(generated: Mapping[Path, str]) -> None:
    stale = [relative(page) for page, text in generated.items() if page.read_text(encoding="utf-8") != text]
    assert stale == [], "run make docs"


def test_generated_parts_cover_all_of_the_code(generated: Mapping[Path, str]) -> None:
    texts = {page.name: text for page, text in generated.items()}
    for name in Settings.model_fields:
        assert f"`OURVIDZ_{name.upper()}`" in texts["settings.md"]
    for name in commands():
        assert f"### ourvidz {name}\n" in texts["cli.md"]
    for name in JobRequest.model_fields:
        assert f"| `{name}` |" in texts["http.md"]


# --- links ------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files of this project that a page points to, each with an anchor or an empty one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("https://", "http://", "mailto:")):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.is_relative_to(ROOT), target
        assert target.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(target), f"{relative(target)} has no heading #{anchor}"


def test_every_page_can_be_found_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [target for target, _ in links(page)]
    assert sorted(map(relative, set(PAGES) - reached)) == []


# --- names that must be real ------------------------------------------------------------------------------


def test_every_test_that_is_named_as_a_guard_exists() -> None:
    page = (ROOT / "docs" / "explanation" / "guarantees.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 24 + 15
    for row in rows:
        guards = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert guards, row
        for file, name in guards:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{file}::{name}"


def test_every_variable_that_is_named_is_a_setting() -> None:
    known = {f"OURVIDZ_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    for page, text in TEXTS.items():
        unknown = set(re.findall(r"\bOURVIDZ_[A-Z_]+[A-Z]\b", text)) - known
        assert not unknown, f"{relative(page)}: {unknown}"


def test_every_field_of_a_profile_is_documented() -> None:
    text = TEXTS[DOCS / "reference/profiles.md"]
    for name in (*Profile.model_fields, *ModelSpec.model_fields):
        assert f"`{name}`" in text, name


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_the_two_commands_of_the_readme_exist() -> None:
    shown = re.findall(r"^make (\w+)", "\n".join(blocks(ROOT / "README.md", "sh")), flags=re.MULTILINE)
    assert shown == ["demo", "serve"]
    assert set(shown) <= make_targets()


def test_every_make_target_that_is_named_exists() -> None:
    for page, text in TEXTS.items():
        named = re.findall(r"`make ([a-z -]+)`", text) + re.findall(
            r"^(?:\w+=\S+ )*make ([a-z ]+?)(?: +#.*)?$", text, re.M
        )
        for target in {word for words in named for word in words.split()}:
            assert target in make_targets(), f"{relative(page)}: make {target}"


def commands() -> dict[str, Any]:
    """Every command below `ourvidz`, by its whole name."""

    def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        below = getattr(command, "commands", None)
        if below is None:
            yield path, command
        for name, child in (below or {}).items():
            yield from walk(child, f"{path} {name}".strip())

    return dict(walk(get_command(command_line), ""))


def invocations(page: Path) -> Iterator[list[str]]:
    """Every call of `ourvidz` in a page's shell blocks and inline code, as words after the program."""
    code = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    code += [span for span in re.findall(r"`([^`\n]+)`", prose(page)) if span.startswith("ourvidz ")]
    for line in code:
        match = re.search(r"(?:^|[\s(])(?:\S*/bin/)?ourvidz ([^|)#]+)", line)
        if match is not None:
            yield shlex.split(match[1])


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_command_that_is_shown_exists_with_its_options(page: Path) -> None:
    known = commands()
    groups = {name.split()[0] for name in known if " " in name}
    for words in invocations(page):
        name = " ".join(words[:2]) if words[0] in groups and len(words) > 1 else words[0]
        if name in groups:
            continue  # a whole group is meant
        assert name in known, f"ourvidz {name}"
        options = {
            option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        given = {word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1}
        assert given <= options, f"ourvidz {name}: {given - options}"


# --- examples that must work ------------------------------------------------------------------------------


def test_every_request_that_is_shown_is_a_job_request() -> None:
    shown = [json.loads(body) for text in TEXTS.values() for body in re.findall(r"-d '(\{.*?\})'", text)]
    assert len(shown) >= 2
    for body in shown:
        JobRequest.model_validate(body)


def test_the_profile_that_is_shown_can_be_loaded() -> None:
    (example,) = blocks(DOCS / "howto/gpu-profiles.md", "yaml")
    profile = Profile.model_validate(yaml.safe_load(example))
    assert {family.value for family in profile.models} == {"sdxl", "rv51", "qwen"}


def test_every_yaml_and_json_that_is_shown_can_be_read() -> None:
    for page in PAGES:
        for body in blocks(page, "yaml"):
            yaml.safe_load(body)
        for body in blocks(page, "json"):
            json.loads(body)


BODY = json.dumps({"id": "msg_1", "type": "job.completed", "job_id": str(UUID(int=2)), "assets": []}).encode()


def signed(at: datetime, secret_version: int = 1, age: float | None = None) -> tuple[CallbackSecrets, dict[str, str]]:
    """The secrets of an installation, and the headers that it sends with BODY."""
    secrets = CallbackSecrets(b"m" * 32)
    user = UUID(int=1)
    delivery = Delivery("msg_1", UUID(int=2), user, "https://x", BODY, "job.completed", 1, 1, secret_version, age)
    return secrets, secrets.headers(delivery, at)


def shown_function(name: str) -> Any:
    """A function of the page about verifying, as it is shown."""
    (block,) = [b for b in blocks(DOCS / "howto/verify-callbacks.md", "python") if f"def {name}(" in b]
    namespace: dict[str, Any] = {}
    exec(block, namespace)  # noqa: S102 - the documentation's own code
    return namespace[name]


@pytest.mark.parametrize("name", ["holds", "event_of"])
def test_the_verification_that_is_shown_holds_for_our_callbacks_and_for_no_others(name: str) -> None:
    verify, user, now = shown_function(name), UUID(int=1), datetime.now(UTC)
    secrets, headers = signed(now)
    secret = secrets.secret(user, 1)
    assert verify(secret, BODY, headers)
    assert not verify(secret, BODY + b" ", headers)
    assert not verify(secret, BODY, headers | {"webhook-id": "msg_2"})
    assert not verify(secret, BODY, {})
    assert not verify(secrets.secret(UUID(int=3), 1), BODY, headers)
    assert not verify(secret, BODY, signed(now - timedelta(minutes=6))[1])


@pytest.mark.parametrize("name", ["holds", "event_of"])
def test_the_verification_that_is_shown_takes_the_old_secret_for_a_day(name: str) -> None:
    verify, user, now = shown_function(name), UUID(int=1), datetime.now(UTC)
    secrets, headers = signed(now, secret_version=2, age=3600.0)
    assert verify(secrets.secret(user, 2), BODY, headers)
    assert verify(secrets.secret(user, 1), BODY, headers)


def test_the_receiver_of_the_tutorial_takes_signed_callbacks_only(tmp_path: Path) -> None:
    (code,) = blocks(DOCS / "tutorial.md", "python")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert "9321" in code
    script = tmp_path / "receiver.py"
    script.write_text(code.replace("9321", str(port)), encoding="utf-8")
    secrets, headers = signed(datetime.now(UTC))
    environment = os.environ | {"CALLBACK_SECRET": secrets.secret(UUID(int=1), 1)}
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as receiver:
        try:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "listening\n"
            assert post(port, headers) == 204
            assert receiver.stdout.readline().startswith("job.completed ")
            assert post(port, headers | {"webhook-id": "msg_2"}) == 401
            assert post(port, {}) == 401
        finally:
            receiver.terminate()


def post(port: int, headers: Mapping[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/hook", BODY, dict(headers))
        return connection.getresponse().status
    finally:
        connection.close()
