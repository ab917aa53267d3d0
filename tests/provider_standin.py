"""A provider's API of Replicate's form, on a real socket of loopback: it takes predictions, and makes what the test
tells it to make, when it tells it to. It can fail in the ways that such providers do."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from PIL import Image

from tests.deployments.hostile import Request, read_request

TOKEN = "r8_a_token_of_the_tests"
VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
Answer = tuple[int, dict[str, str], bytes]


def picture(colour: str = "orange", size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    """A file as a model might make it."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@dataclass
class Standin:
    """`predictions` is what was taken, in order; `requests` what was heard. `fault`, asked of each request first, may
    answer in the place of everything else, or raise `ConnectionResetError` to break off. With `at_once`, predictions
    have succeeded as soon as they are asked for."""

    port: int = 0
    at_once: bool = True
    token: str = TOKEN
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], Answer | None] | None = None
    after_create: Callable[[], None] | None = None  # called when one was taken, before the answer
    makes: list[tuple[str, bytes]] = field(default_factory=lambda: [("image/png", picture())])
    heard: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def created(self) -> list[dict[str, Any]]:
        return list(self.predictions.values())

    def asked(self, method: str, part: str = "") -> list[Request]:
        """The requests of that kind."""
        return [one for one in self.requests if one.method == method and part in one.target]

    async def until(self, seen: Callable[[], Any]) -> None:
        """Wait until a request has brought that about."""
        async with asyncio.timeout(30), self.heard:
            await self.heard.wait_for(lambda: bool(seen()))

    def succeed(self, name: str) -> None:
        """The prediction's files are there."""
        prediction, urls = self.predictions[name], []
        for number, (kind, data) in enumerate(self.makes):
            self.files[f"/files/{name}/{number}"] = (kind, data)
            urls.append(f"{self.origin}/files/{name}/{number}")
        done = datetime.now(UTC).isoformat()
        prediction |= {"status": "succeeded", "output": urls, "metrics": {"predict_time": 1.5}, "completed_at": done}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request on one connection."""
        try:
            request = await read_request(reader)
            self.requests.append(request)
            status, headers, body = (self.fault(request) if self.fault else None) or self._answer(request)
            lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", "connection: close"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            await writer.drain()
        except (ConnectionResetError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            writer.close()
            async with self.heard:
                self.heard.notify_all()

    def _answer(self, request: Request) -> Answer:
        path = request.target.partition("?")[0]
        if path in self.files:
            kind, data = self.files[path]
            return 200, {"content-type": kind}, data
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return document(401, {"detail": "no"})
        if path == "/v1/predictions" and request.method == "POST":
            return self._create(json.loads(request.body))
        if path == "/v1/predictions":
            return document(200, {"next": None, "previous": None, "results": self.created[::-1]})
        name = path.removeprefix("/v1/predictions/").removesuffix("/cancel")
        prediction = self.predictions.get(name)
        if prediction is None:
            return document(404, {"detail": "not found"})
        if path.endswith("/cancel") and prediction["status"] in ("starting", "processing"):
            prediction["status"] = "canceled"
        return document(200, prediction)

    def _create(self, body: dict[str, Any]) -> Answer:
        name = f"p{len(self.predictions):025d}"
        self.predictions[name] = {
            "id": name,
            "version": body["version"],
            "input": body["input"],
            "status": "starting",
            "output": None,
            "error": None,
            "metrics": {},
            "created_at": datetime.now(UTC).isoformat(),
            "completed_at": None,
        }
        answer = document(201, self.predictions[name])
        if self.at_once:
            self.succeed(name)
        if self.after_create is not None:
            self.after_create()
        return answer


def document(status: int, body: Any, **headers: str) -> Answer:
    """An answer in JSON."""
    return status, {"content-type": "application/json"} | headers, json.dumps(body).encode()


@contextlib.asynccontextmanager
async def standing_in() -> AsyncIterator[Standin]:
    """The stand-in, listening."""
    standin = Standin()
    server = await asyncio.start_server(standin.serve, "127.0.0.1", 0)
    standin.port = server.sockets[0].getsockname()[1]
    try:
        yield standin
    finally:
        server.close()


async def turn_on(pool: Any, standin: Standin, family: str = "rv51", **model: Any) -> Any:
    """The rows by which an admin turns a provider on; the id of its model. `model` are columns of it."""
    await pool.execute(
        """INSERT INTO api_providers (name, display_name, base_url, secret_name, output_hosts, is_active)
           VALUES ('replicate', 'Replicate', $1, 'TEST_API_TOKEN', '{127.0.0.1}', true)
           ON CONFLICT (name) DO UPDATE SET base_url = excluded.base_url, secret_name = excluded.secret_name,
             output_hosts = excluded.output_hosts, is_active = true""",
        f"{standin.origin}/v1/",
    )
    values = {
        "model_key": f"them/{family}",
        "display_name": "M",
        "modality": "image",
        "model_family": family,
        "version": VERSION,
        "tasks": ["t2i", "i2i"],
        "pricing": {"usd_per_second": 0.002, "usd_per_prediction": 0.001},
        "capabilities": {"scheduler_aliases": {"euler": "K_EULER", "dpmpp_2m_karras": "KarrasDPM"}},
        "input_defaults": {"refine": "no_refiner"},
        **model,
    }
    places = ", ".join(f"${number}" for number in range(1, len(values) + 1))
    return await pool.fetchval(
        f"""INSERT INTO api_models (provider_id, {", ".join(values)})
            SELECT id, {places} FROM api_providers WHERE name = 'replicate' RETURNING id""",  # noqa: S608
        *values.values(),
    )
