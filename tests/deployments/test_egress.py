import asyncio
import datetime
import gzip
import ipaddress
import ssl
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deployments.egress import AllowedHost, Egress, EgressFailed, EgressPolicy, EgressRefused
from tests.deployments import hostile

PNG = ("image/png",)


class Names:
    """A resolver whose answers the test writes, one after another; it counts the questions."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if not answer:
            raise OSError("no such name")
        return answer


def egress_to(receiver: hostile.Receiver) -> Egress:
    return Egress(EgressPolicy(allow=(AllowedHost.parse(f"http://127.0.0.1:{receiver.port}"),)))


async def post(egress: Egress, url: str, timeout_seconds: float = 20) -> object:
    return await egress.post(url, b"{}", {}, timeout_seconds, max_response_bytes=64)


# ------------------------------------------------------------------------------------------------ form of the URL


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/", "scheme"),
        ("ftp://example.com/", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("javascript:alert(1)", "malformed"),
        ("example.com/hook", "malformed"),
        ("//example.com/hook", "malformed"),
        ("https:/example.com", "malformed"),
        ("", "malformed"),
        ("https://example.com\\@127.0.0.1/", "malformed"),
        ("https://exa mple.com/", "malformed"),
        ("https://example.com/\r\nHost: x", "malformed"),
        ("https://[::1", "malformed"),
        ("https://[1.2.3.4]/", "malformed"),
        ("https://①②⑦.⓪.⓪.①/", "malformed"),
        ("https://ｅxample.com/", "malformed"),
        ("https://user@example.com/", "userinfo"),
        ("https://user:word@example.com/", "userinfo"),
        ("https://@example.com/", "userinfo"),
        ("https://example.com:22/", "port"),
        ("https://example.com:80/", "port"),
        ("https://example.com:0/", "port"),
        ("https://example.com:70000/", "port"),
        ("https:///hook", "host"),
        ("https://a..b/", "host"),
        ("https://.example.com/", "host"),
        ("https://example.com./", "host"),
        ("https://-example.com/", "host"),
        ("https://a%2eb/", "host"),
        ("https://" + "a" * 64 + ".com/", "host"),
        ("https://" + "a." * 127 + "com/", "host"),
        ("https://2130706433/", "address_notation"),
        ("https://0x7f.1/", "address_notation"),
        ("https://0177.1/", "address_notation"),
        ("https://0177.0.0.1/", "malformed"),
        ("https://127.1/", "address_notation"),
        ("https://127.0.0.1./", "address_notation"),
        ("https://127.0.0.1/", "private_address"),
        ("https://127。0。0。1/", "private_address"),
        ("https://169.254.169.254/latest/meta-data", "private_address"),
        ("https://[::1]/", "private_address"),
        ("https://[::ffff:127.0.0.1]/", "private_address"),
        ("https://[fe80::1%25eth0]/", "private_address"),
        ("https://[64:ff9b::7f00:1]/", "private_address"),
        ("https://example.com/" + "a" * 2048, "too_long"),
    ],
)
async def test_check_refuses_bad_form_without_asking_for_the_name(url: str, reason: str) -> None:
    names = Names(["8.8.8.8"])
    with pytest.raises(EgressRefused) as refusal:
        await Egress(EgressPolicy(), names).check(url)
    assert refusal.value.reason == reason
    assert names.asked == []


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://example.com/hook?x=1#part", "example.com"),
        ("HTTPS://Example.COM/", "example.com"),
        ("https://exämple.com:8443/", "xn--exmple-cua.com"),
        ("https://8.8.8.8/", "8.8.8.8"),
        ("https://[2606:4700:4700::1111]/", "2606:4700:4700::1111"),
    ],
)
async def test_check_passes_public_https(url: str, host: str) -> None:
    names = Names(["8.8.8.8", "2606:4700:4700::1111"])
    await Egress(EgressPolicy(), names).check(url)
    assert [asked for asked, _ in names.asked] == [host]


async def test_refusal_names_neither_url_nor_address() -> None:
    with pytest.raises(EgressRefused) as refusal:
        await Egress(EgressPolicy(), Names(["10.11.12.13"])).check("https://secret-name.example.com/token")
    assert "secret" not in str(refusal.value)
    assert "10.11" not in str(refusal.value)
    assert refusal.value.code == "url_refused"


# --------------------------------------------------------------------------------------------------- the name


async def test_check_refuses_one_private_address_among_many() -> None:
    public = [f"8.8.8.{last}" for last in range(15)]
    with pytest.raises(EgressRefused) as refusal:
        await Egress(EgressPolicy(), Names([*public, "192.168.0.1"])).check("https://many.example.com/")
    assert refusal.value.reason == "private_address"


@pytest.mark.parametrize("answer", [[], ["not an address"]])
async def test_check_fails_where_the_name_has_no_address(answer: list[str]) -> None:
    with pytest.raises(EgressFailed) as failure:
        await Egress(EgressPolicy(), Names(answer)).check("https://gone.example.com/")
    assert failure.value.reason == "unresolvable"


async def test_check_gives_up_on_a_resolver_that_does_not_answer() -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    with pytest.raises(EgressFailed) as failure:
        await Egress(EgressPolicy(resolve_timeout_seconds=0.05), never).check("https://slow.example.com/")
    assert failure.value.reason == "unresolvable"


async def test_post_refuses_a_name_that_became_private_after_the_check() -> None:
    async with hostile.receiving(hostile.answer(200)) as receiver:
        names = Names(["8.8.8.8"], ["127.0.0.1"])
        egress = Egress(EgressPolicy(ports=(receiver.port,)), names)
        url = f"https://rebinding.example.com:{receiver.port}/"
        await egress.check(url)
        with pytest.raises(EgressRefused) as refusal:
            await post(egress, url)
    assert refusal.value.reason == "private_address"
    assert receiver.connections == 0


async def test_post_resolves_once_and_connects_to_that_answer() -> None:
    async with hostile.receiving(hostile.answer(200)) as receiver:
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        allowed = AllowedHost("hook.example.com", receiver.port, "http")
        await post(Egress(EgressPolicy(allow=(allowed,)), names), f"http://hook.example.com:{receiver.port}/")
    assert names.asked == [("hook.example.com", receiver.port)]
    assert receiver.requests[0].headers["host"] == f"hook.example.com:{receiver.port}"


async def test_post_tries_the_next_address_when_one_is_dead() -> None:
    async with hostile.receiving(hostile.answer(200)) as receiver:
        allowed = AllowedHost("hook.example.com", receiver.port, "http")
        egress = Egress(EgressPolicy(allow=(allowed,)), Names(["127.0.0.9", "127.0.0.1"]))
        await post(egress, f"http://hook.example.com:{receiver.port}/")
    assert receiver.connections == 1


async def test_system_resolver_finds_loopback_and_the_check_refuses_it() -> None:
    with pytest.raises(EgressRefused) as refusal:
        await Egress(EgressPolicy()).check("https://localhost/")
    assert refusal.value.reason == "private_address"


# --------------------------------------------------------------------------------------------------- allow-list


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9001/", "https://127.0.0.1:9000/", "http://127.0.0.2:9000/", "http://localhost:9000/"]
)
async def test_allow_list_admits_only_its_own_scheme_host_and_port(url: str) -> None:
    egress = Egress(EgressPolicy(allow=(AllowedHost.parse("http://127.0.0.1:9000"),)))
    with pytest.raises(EgressRefused):
        await egress.check(url)


async def test_allow_list_admits_what_it_names() -> None:
    names = Names(["127.0.0.1"])
    await Egress(EgressPolicy(allow=(AllowedHost.parse("http://127.0.0.1:9000"),)), names).check(
        "http://127.0.0.1:9000/hook"
    )
    assert names.asked == [("127.0.0.1", 9000)]


async def test_allow_listed_name_may_not_lead_to_a_metadata_service() -> None:
    egress = Egress(EgressPolicy(allow=(AllowedHost("hook.internal", 443),)), Names(["169.254.169.254"]))
    with pytest.raises(EgressRefused) as refusal:
        await egress.check("https://hook.internal/")
    assert refusal.value.reason == "private_address"


async def test_allow_listed_host_may_not_hold_userinfo() -> None:
    egress = Egress(EgressPolicy(allow=(AllowedHost.parse("http://127.0.0.1:9000"),)))
    with pytest.raises(EgressRefused):
        await egress.check("http://a:b@127.0.0.1:9000/")


@pytest.mark.parametrize("origin", ["127.0.0.1:9000", "http://h:1/path", "http://u@h:1", "ftp://h:1", "http://:1"])
def test_allowed_host_is_an_origin_only(origin: str) -> None:
    with pytest.raises(ValueError):
        AllowedHost.parse(origin)


def test_allowed_host_takes_the_port_of_its_scheme() -> None:
    assert AllowedHost.parse("https://Hook.internal") == AllowedHost("hook.internal", 443, "https")


# ----------------------------------------------------------------------------------------------------- post


async def test_post_sends_body_and_headers_and_reads_the_answer() -> None:
    async with hostile.receiving(hostile.answer(201, b"thanks", retry_after="7")) as receiver:
        posted = await egress_to(receiver).post(receiver.url, b'{"a":1}', {"webhook-id": "msg_1"}, 20, 64)
    sent = receiver.requests[0]
    assert (sent.method, sent.target, sent.body) == ("POST", "/hook?a=1", b'{"a":1}')
    assert sent.headers["webhook-id"] == "msg_1"
    assert sent.headers["accept-encoding"] == "identity"
    assert (posted.status, posted.body_excerpt, posted.headers["retry-after"]) == (201, "thanks", "7")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_post_does_not_follow_a_redirect(status: int) -> None:
    async with hostile.receiving(hostile.answer(200)) as inner:
        moved = hostile.answer(status, location=inner.url)
        async with hostile.receiving(moved) as receiver:
            egress = Egress(
                EgressPolicy(
                    allow=(
                        AllowedHost("127.0.0.1", receiver.port, "http"),
                        AllowedHost("127.0.0.1", inner.port, "http"),
                    )
                )
            )
            posted = await egress.post(receiver.url, b"{}", {}, 20, 64)
    assert posted.status == status
    assert inner.connections == 0


async def test_post_ignores_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hostile.receiving(hostile.answer(502)) as proxy, hostile.receiving(hostile.answer(200)) as receiver:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        posted = await egress_to(receiver).post(receiver.url, b"{}", {}, 20, 64)
    assert posted.status == 200
    assert proxy.connections == 0


async def test_post_keeps_no_cookie_and_no_connection() -> None:
    async with hostile.receiving(hostile.answer(200, set_cookie="a=b")) as receiver:
        egress = egress_to(receiver)
        await post(egress, receiver.url)
        await post(egress, receiver.url)
    assert "cookie" not in receiver.requests[1].headers
    assert receiver.connections == 2


@pytest.mark.parametrize("script", [hostile.trickle, hostile.slow_head, hostile.silence])
async def test_post_gives_up_at_the_total_timeout(script: hostile.Script) -> None:
    async with hostile.receiving(script) as receiver:
        with pytest.raises(EgressFailed) as failure:
            # the limit on the bytes must not end the trickle before the clock does
            await egress_to(receiver).post(receiver.url, b"{}", {}, 0.5, 2_000_000)
    assert failure.value.reason == "timeout"


async def test_post_reads_an_endless_answer_only_to_its_limit() -> None:
    async with hostile.receiving(hostile.endless) as receiver:
        posted = await egress_to(receiver).post(receiver.url, b"{}", {}, 20, 64)
    assert (posted.status, posted.body_excerpt) == (200, "x" * 64)


@pytest.mark.parametrize(
    ("script", "reason"),
    [(hostile.reset, "connection_lost"), (hostile.hang_up, "protocol"), (b"\x16\x03\x01", "protocol")],
)
async def test_post_fails_on_half_an_answer(script: hostile.Script | bytes, reason: str) -> None:
    async with hostile.receiving(script) as receiver:
        with pytest.raises(EgressFailed) as failure:
            await post(egress_to(receiver), receiver.url)
    assert failure.value.reason == reason


async def test_post_fails_where_nobody_listens() -> None:
    async with hostile.receiving(hostile.answer(200)) as receiver:
        pass
    with pytest.raises(EgressFailed) as failure:
        await post(egress_to(receiver), receiver.url)
    assert failure.value.reason == "unreachable"


async def test_post_excerpt_holds_no_control_characters() -> None:
    said = b"a\x00b\x1b[31m\n\xff\xe2\x80\xaec"
    async with hostile.receiving(hostile.answer(500, said)) as receiver:
        posted = await egress_to(receiver).post(receiver.url, b"{}", {}, 20, 64)
    assert posted.body_excerpt == "a\ufffdb\ufffd[31m\n\ufffd\ufffdc"


# ---------------------------------------------------------------------------------------------------- fetch


async def test_fetch_gives_the_body_and_its_type() -> None:
    said = hostile.answer(200, b"data", content_type="Image/PNG; charset=binary")
    async with hostile.receiving(said) as receiver:
        fetched = await egress_to(receiver).fetch(receiver.url, 4, 20, PNG)
    assert (fetched.data, fetched.content_type) == (b"data", "image/png")
    sent = receiver.requests[0].headers
    assert (sent["accept"], sent["accept-encoding"]) == ("image/png", "identity")
    assert sent["user-agent"].startswith("ourvidz-serve/")


async def test_fetch_fails_one_byte_over_the_limit() -> None:
    async with hostile.receiving(hostile.answer(200, b"12345", content_type="image/png")) as receiver:
        with pytest.raises(EgressFailed) as failure:
            await egress_to(receiver).fetch(receiver.url, 4, 20, PNG)
    assert failure.value.reason == "too_large"


async def test_fetch_stops_an_endless_body() -> None:
    async with hostile.receiving(hostile.endless) as receiver:
        with pytest.raises(EgressFailed) as failure:
            await egress_to(receiver).fetch(receiver.url, 100_000, 20, PNG)
    assert failure.value.reason == "too_large"


@pytest.mark.parametrize("layers", [1, 2])
async def test_fetch_stops_a_gzip_bomb_before_it_fills_memory(layers: int) -> None:
    bomb = bytes(200 * 2**20)
    for _ in range(layers):
        bomb = gzip.compress(bomb)
    said = hostile.answer(200, bomb, content_type="image/png", content_encoding=", ".join(["gzip"] * layers))
    async with hostile.receiving(said) as receiver:
        egress = egress_to(receiver)
        tracemalloc.start()
        try:
            with pytest.raises(EgressFailed) as failure:
                await egress.fetch(receiver.url, 100_000, 20, PNG)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert failure.value.reason == "too_large"
    assert peak_bytes < 16 * 2**20


async def test_fetch_reads_a_compressed_body() -> None:
    said = hostile.answer(200, gzip.compress(b"data"), content_type="image/png", content_encoding="gzip")
    async with hostile.receiving(said) as receiver:
        fetched = await egress_to(receiver).fetch(receiver.url, 4, 20, PNG)
    assert fetched.data == b"data"


async def test_fetch_fails_on_damaged_compression() -> None:
    said = hostile.answer(200, b"not gzip", content_type="image/png", content_encoding="gzip")
    async with hostile.receiving(said) as receiver:
        with pytest.raises(EgressFailed) as failure:
            await egress_to(receiver).fetch(receiver.url, 100, 20, PNG)
    assert failure.value.reason == "encoding"


async def test_fetch_refuses_a_redirect() -> None:
    async with hostile.receiving(hostile.answer(302, location="http://127.0.0.1/")) as receiver:
        with pytest.raises(EgressRefused) as refusal:
            await egress_to(receiver).fetch(receiver.url, 100, 20, PNG)
    assert refusal.value.reason == "redirect"


async def test_fetch_tells_another_status() -> None:
    async with hostile.receiving(hostile.answer(404)) as receiver:
        with pytest.raises(EgressFailed) as failure:
            await egress_to(receiver).fetch(receiver.url, 100, 20, PNG)
    assert (failure.value.reason, failure.value.status) == ("status", 404)


@pytest.mark.parametrize("kind", [{"content_type": "text/html"}, {}])
async def test_fetch_refuses_another_type(kind: dict[str, str]) -> None:
    async with hostile.receiving(hostile.answer(200, b"data", **kind)) as receiver:
        with pytest.raises(EgressRefused) as refusal:
            await egress_to(receiver).fetch(receiver.url, 100, 20, PNG)
    assert refusal.value.reason == "content_type"


# ------------------------------------------------------------------------------------------------------ TLS


def self_signed(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context with a certificate for `name` alone, and a client's context that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        alternative = x509.DNSName(name)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(pem)
    client = ssl.create_default_context(cafile=str(pem))
    return server, client


async def test_post_checks_the_certificate_against_the_name_of_the_url(tmp_path: Path) -> None:
    server, client = self_signed(tmp_path, "hook.example.com")
    asked: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    async with hostile.receiving(hostile.answer(200), tls=server) as receiver:
        allowed = AllowedHost("hook.example.com", receiver.port)
        egress = Egress(EgressPolicy(allow=(allowed,)), Names(["127.0.0.1"]), client)
        posted = await egress.post(f"https://hook.example.com:{receiver.port}/", b"{}", {}, 20, 64)
    assert posted.status == 200
    assert asked == ["hook.example.com"]


@pytest.mark.parametrize("name", ["other.example.com", "127.0.0.1"])
async def test_post_fails_on_a_certificate_of_another_name(tmp_path: Path, name: str) -> None:
    server, client = self_signed(tmp_path, name)
    async with hostile.receiving(hostile.answer(200), tls=server) as receiver:
        allowed = AllowedHost("hook.example.com", receiver.port)
        egress = Egress(EgressPolicy(allow=(allowed,)), Names(["127.0.0.1"]), client)
        with pytest.raises(EgressFailed) as failure:
            await post(egress, f"https://hook.example.com:{receiver.port}/")
    assert failure.value.reason == "tls"
    assert receiver.requests == []


async def test_post_fails_on_a_certificate_that_nobody_signed(tmp_path: Path) -> None:
    server, _ = self_signed(tmp_path, "hook.example.com")
    async with hostile.receiving(hostile.answer(200), tls=server) as receiver:
        allowed = AllowedHost("hook.example.com", receiver.port)
        egress = Egress(EgressPolicy(allow=(allowed,)), Names(["127.0.0.1"]))
        with pytest.raises(EgressFailed) as failure:
            await post(egress, f"https://hook.example.com:{receiver.port}/")
    assert failure.value.reason == "tls"
    assert receiver.requests == []
