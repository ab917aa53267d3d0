"""A receiver of callbacks on this machine: takes what is posted to it and checks who signed it."""

import json
import threading
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from uuid import UUID

from standardwebhooks import Webhook, WebhookVerificationError

MAX_BODY_BYTES = 1_000_000


@dataclass(frozen=True)
class Delivery:
    """A callback whose signature holds. `id` is the same in every repeat of it."""

    id: str
    type: str
    job_id: UUID
    status: str


class Receiver:
    """An HTTP server in a thread of its own. A context manager; it listens from the moment it is made.

    It answers 204 to what is signed with the trusted secret, 401 to what is not, and 503 until it was told whom to
    trust, which makes the sender try again.
    """

    def __init__(self, port: int = 0) -> None:
        """On a free port of 127.0.0.1, unless a port is given. Raises OSError where that is taken."""
        self._changed = threading.Condition()
        self._webhook: Webhook | None = None
        self._deliveries: list[Delivery] = []
        self._rejected = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="receiver", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def origin(self) -> str:
        """What must be allowed for callbacks to get here: `http://127.0.0.1:<port>`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def rejected(self) -> int:
        """How many requests came whose signature did not hold."""
        with self._changed:
            return self._rejected

    def trust(self, secret: str) -> None:
        """Accept what is signed with this secret (`whsec_…`)."""
        with self._changed:
            self._webhook = Webhook(secret)

    def deliveries(self, job_id: UUID) -> list[Delivery]:
        """The verified callbacks of a job so far, in the order of their coming, repeats left out."""
        with self._changed:
            seen = {delivery.id: delivery for delivery in self._deliveries if delivery.job_id == job_id}
        return list(seen.values())

    def wait_for(self, job_id: UUID, event: str, timeout_seconds: float) -> bool:
        """Wait for the verified callback of that type. False when it did not come in time. Blocks its thread."""
        with self._changed:
            return self._changed.wait_for(
                lambda: any(d.job_id == job_id and d.type == event for d in self._deliveries), timeout_seconds
            )

    def _take(self, headers: dict[str, str], body: bytes) -> HTTPStatus:
        with self._changed:
            webhook = self._webhook
        if webhook is None:
            return HTTPStatus.SERVICE_UNAVAILABLE
        try:
            webhook.verify(body, headers, json_parse=False)
            content = json.loads(body)
            delivery = Delivery(content["id"], content["type"], UUID(content["job_id"]), content["status"])
        except (WebhookVerificationError, ValueError, KeyError, TypeError):
            with self._changed:
                self._rejected += 1
            return HTTPStatus.UNAUTHORIZED
        with self._changed:
            self._deliveries.append(delivery)
            self._changed.notify_all()
        return HTTPStatus.NO_CONTENT

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # a sender that stops in the middle holds its thread no longer

            def do_POST(self) -> None:
                length = self.headers.get("content-length", "")
                if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                    status = HTTPStatus.LENGTH_REQUIRED if not length else HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                    self.close_connection = True
                else:
                    body = self.rfile.read(int(length))
                    status = take({name.lower(): value for name, value in self.headers.items()}, body)
                self.send_response(status)
                if status != HTTPStatus.NO_CONTENT:
                    self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: stderr belongs to the progress of the jobs."""

        return Handler
