"""Files by signed URL: who holds one may read that file, for a while, and no other."""

import re
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from db.blobs import UrlSigner
from tests.serve_app.conftest import BASE, SECRET, InProcess

KEY = "alice/job/1/0.png"
DATA = bytes(range(256)) * 40


@pytest.fixture
async def reader(server: InProcess) -> httpx2.AsyncClient:
    """A client without an API key, beside a stored file."""
    await server.blobs.put("workspace-temp", KEY, DATA, "image/png")
    return await server.client()


def url(key: str = KEY, bucket: str = "workspace-temp", seconds: int = 60, secret: str = SECRET) -> str:
    return UrlSigner(secret.encode(), BASE).sign(bucket, key, seconds)


async def test_a_signed_url_gives_the_file_without_a_key(reader: httpx2.AsyncClient) -> None:
    answer = await reader.get(url())
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(DATA))


async def test_a_file_can_not_be_run_or_guessed_at_by_a_browser(reader: httpx2.AsyncClient) -> None:
    headers = (await reader.get(url())).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"]
    assert headers["cache-control"].startswith("private")
    assert headers["content-disposition"] == 'inline; filename="0.png"'


@pytest.mark.parametrize(
    "change",
    [
        lambda u: re.sub(r"signature=.", "signature=x", u),
        lambda u: re.sub(r"signature=.*", "signature=", u),
        lambda u: re.sub(r"signature=.*", "signature=%C3%A9", u),
        lambda u: re.sub(r"expires=(\d+)", lambda m: f"expires={int(m[1]) + 1}", u),
        lambda u: u.replace("/0.png", "/1.png"),
        lambda u: u.replace("workspace-temp", "user-library"),
        lambda u: u.replace("workspace-temp/", "workspace-temp//"),
        lambda u: u.replace("0.png", "0.thumb.webp"),
    ],
)
async def test_a_changed_url_gives_nothing(reader: httpx2.AsyncClient, change: Callable[[str], str]) -> None:
    answer = await reader.get(change(url()))
    assert (answer.status_code, answer.headers["content-type"]) == (403, "application/problem+json")


async def test_a_url_of_another_secret_gives_nothing(reader: httpx2.AsyncClient) -> None:
    assert (await reader.get(url(secret="t" * 40))).status_code == 403


@pytest.mark.parametrize("missing", ["expires", "signature"])
async def test_an_unsigned_url_gives_nothing(reader: httpx2.AsyncClient, missing: str) -> None:
    parts = urlsplit(url())
    query = {name: values[0] for name, values in parse_qs(parts.query).items() if name != missing}
    answer = await reader.get(parts.path, params=query)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, missing)


async def test_an_api_key_is_no_signature(server: InProcess, reader: httpx2.AsyncClient) -> None:
    admin = await server.user("root", "admin")
    query = {"expires": 2**40, "signature": "0" * 64}
    assert (await admin.get(f"/v1/files/workspace-temp/{KEY}", params=query)).status_code == 403


async def test_an_expired_url_says_so(reader: httpx2.AsyncClient) -> None:
    answer = await reader.get(url(seconds=-1))
    assert (answer.status_code, answer.json()["code"]) == (410, "url_expired")


async def test_an_expired_url_of_another_secret_is_just_wrong(reader: httpx2.AsyncClient) -> None:
    assert (await reader.get(url(seconds=-1, secret="t" * 40))).status_code == 403


async def test_a_signed_url_of_nothing_is_not_found(reader: httpx2.AsyncClient) -> None:
    assert (await reader.get(url("alice/job/1/9.png"))).status_code == 404


@pytest.mark.parametrize(
    ("bucket", "key"),
    [
        ("workspace-temp", "..%2F..%2Fsecrets.json"),
        ("workspace-temp", "a/../../../state/secrets.json"),
        ("workspace-temp", "/etc/passwd"),
        ("workspace-temp", "a\\b"),
        ("workspace-temp", ".hidden"),
        ("etc", "passwd"),
        ("..", "state/secrets.json"),
    ],
)
async def test_even_a_signed_url_leads_to_no_file_of_another_kind(
    reader: httpx2.AsyncClient, bucket: str, key: str
) -> None:
    answer = await reader.get(url(key, bucket))
    assert answer.status_code in (403, 404)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("given", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, len(DATA)),
        ("bytes=-100", len(DATA) - 100, len(DATA)),
        ("bytes=0-999999", 0, len(DATA)),
        ("bytes=-999999", 0, len(DATA)),
    ],
)
async def test_a_range_gives_those_bytes(reader: httpx2.AsyncClient, given: str, start: int, end: int) -> None:
    answer = await reader.get(url(), headers={"Range": given})
    assert (answer.status_code, answer.content) == (206, DATA[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"
    assert answer.headers["content-length"] == str(end - start)


@pytest.mark.parametrize("given", [f"bytes={len(DATA)}-", "bytes=99999-100000", "bytes=-0"])
async def test_a_range_outside_of_the_file_is_refused(reader: httpx2.AsyncClient, given: str) -> None:
    answer = await reader.get(url(), headers={"Range": given})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(DATA)}")


@pytest.mark.parametrize(
    "given",
    ["bytes=5-3", "bytes=-", "bytes=a-b", "items=0-1", "bytes=0-1,5-6", "bytes=\u00b2-", "bytes=0-" + "9" * 5000, ""],
)
async def test_a_range_that_is_none_is_ignored(reader: httpx2.AsyncClient, given: str) -> None:
    answer = await reader.get(url(), headers=[(b"Range", given.encode("latin-1"))])
    assert (answer.status_code, answer.content) == (200, DATA)


@pytest.mark.parametrize(("given", "status", "length"), [(None, 200, len(DATA)), ("bytes=0-9", 206, 10)])
async def test_head_tells_the_same_without_the_file(
    reader: httpx2.AsyncClient, given: str | None, status: int, length: int
) -> None:
    answer = await reader.head(url(), headers={"Range": given} if given else {})
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (status, b"", str(length))
    assert answer.headers["accept-ranges"] == "bytes"


async def test_a_file_can_be_read_only(reader: httpx2.AsyncClient) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert (await reader.request(method, url())).status_code == 405
