"""The receiver of the fault matrix: it verifies, keeps, misbehaves, and comes back on its port."""

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx2
import pytest
from standardwebhooks import Webhook

from benchmarks.chaos.receiver import Conduct, Receiver

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
BODY = json.dumps({"job_id": "a", "status": "completed"})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver(slow_seconds=0.2)
    server.trust(SECRET)
    yield server
    server.behave(Conduct.GOOD)  # so that there is something to close
    server.close()


def post(receiver: Receiver, secret: str = SECRET) -> int:
    now = datetime.now(UTC)
    signature = Webhook(secret).sign("msg_1", now, BODY)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signature,
        "content-type": "application/json",
    }
    return httpx2.post(receiver.origin, content=BODY, headers=headers, timeout=10).status_code


def test_receiver_verifies_and_keeps_what_it_takes(receiver: Receiver) -> None:
    assert post(receiver) == 204
    assert post(receiver, "whsec_" + base64.b64encode(b"x" * 32).decode()) == 204
    assert [(r.id, r.job_id, r.verified, r.taken) for r in receiver.kept()] == [
        ("msg_1", "a", True, True),
        ("msg_1", "a", False, True),
    ]


@pytest.mark.parametrize(
    ("conduct", "answer"),
    [(Conduct.SLOW, 204), (Conduct.ERROR, 500), (Conduct.GONE, 410), (Conduct.MOVED, 301)],
)
def test_receiver_answers_as_it_was_told(receiver: Receiver, conduct: Conduct, answer: int) -> None:
    receiver.behave(conduct)
    assert post(receiver) == answer
    assert [receipt.taken for receipt in receiver.kept()] == [answer == 204]


def test_receiver_that_resets_has_read_and_not_taken(receiver: Receiver) -> None:
    receiver.behave(Conduct.RESETTING)
    with pytest.raises(httpx2.TransportError):
        post(receiver)
    assert [(receipt.answered, receipt.taken) for receipt in receiver.kept()] == [(None, False)]


def test_receiver_comes_back_on_its_port(receiver: Receiver) -> None:
    receiver.behave(Conduct.DOWN)
    with pytest.raises(httpx2.ConnectError):
        post(receiver)
    receiver.behave(Conduct.GOOD)
    assert post(receiver) == 204
