"""The receiver of callbacks: verifies and keeps everything that it is sent, and misbehaves when told to."""

import json
import socket
import struct
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError


class Conduct(StrEnum):
    """How the receiver answers."""

    GOOD = "good"
    DOWN = "down"  # nobody listens
    SLOW = "slow"  # answers after a while
    RESETTING = "resetting"  # reads the request, then resets the connection
    ERROR = "500"
    GONE = "410"
    MOVED = "301"


@dataclass(frozen=True)
class Receipt:
    """One request that came in. `answered` is None where no answer was sent."""

    at: float
    id: str
    job_id: str
    status: str
    verified: bool
    answered: int | None

    @property
    def taken(self) -> bool:
        """Whether the sender may believe that it was delivered."""
        return self.answered is not None and 200 <= self.answered < 300


class Receiver:
    """An HTTP server on a port of 127.0.0.1 that it keeps when it goes down and comes up."""

    def __init__(self, slow_seconds: float = 2.0) -> None:
        self.receipts: list[Receipt] = []
        self.conduct = Conduct.GOOD
        self._slow_seconds = slow_seconds
        self._lock = threading.Lock()
        self._webhook: Webhook | None = None
        self._server = self._listen(0)
        self._port = int(self._server.server_address[1])

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"http://127.0.0.1:{self._port}"

    def trust(self, secret: str) -> None:
        """Verify signatures with this secret from now on."""
        self._webhook = Webhook(secret)

    def behave(self, conduct: Conduct) -> None:
        """Answer like this from now on."""
        if self.conduct is Conduct.DOWN and conduct is not Conduct.DOWN:
            self._server = self._listen(self._port)
        elif conduct is Conduct.DOWN and self.conduct is not Conduct.DOWN:
            self.close()
        self.conduct = conduct

    def kept(self) -> list[Receipt]:
        """What came in until now, in order."""
        with self._lock:
            return list(self.receipts)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _listen(self, port: int) -> ThreadingHTTPServer:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver._take(self, body)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def _take(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        conduct = self.conduct
        answer = {Conduct.RESETTING: None, Conduct.ERROR: 500, Conduct.GONE: 410, Conduct.MOVED: 301}.get(conduct, 204)
        if conduct is Conduct.SLOW:
            time.sleep(self._slow_seconds)
        said: dict[str, Any] = json.loads(body)
        headers = {name.lower(): value for name, value in request.headers.items()}
        receipt = Receipt(
            time.time(),
            headers.get("webhook-id", ""),
            said["job_id"],
            said["status"],
            self._holds(body, headers),
            answer,
        )
        with self._lock:
            self.receipts.append(receipt)
        if answer is None:
            linger = struct.pack("ii", 1, 0)  # closing sends RST instead of FIN
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.close_connection = True
            request.connection.close()
            return
        request.send_response(answer)
        if answer == 301:
            request.send_header("location", f"{self.origin}/elsewhere")
        request.send_header("content-length", "0") if answer != 204 else None
        request.end_headers()

    def _holds(self, body: bytes, headers: dict[str, str]) -> bool:
        if self._webhook is None:
            return False
        try:
            self._webhook.verify(body, headers)
        except WebhookVerificationError:
            return False
        return True
