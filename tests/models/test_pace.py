"""What forwards take on a device that computes while the host goes on: the events of a card are simulated."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from models.denoising.lanes import Pace


class Card:
    """A clock, and until when the card has work. Times in seconds."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0

    def event(self, **_: Any) -> Any:
        at = SimpleNamespace(seconds=0.0)

        def record() -> None:
            at.seconds = max(self.now, self.busy_until)

        def synchronize() -> None:
            self.now = max(self.now, at.seconds)

        return SimpleNamespace(
            at=at,
            record=record,
            synchronize=synchronize,
            elapsed_time=lambda end: 1000 * (end.at.seconds - at.seconds),
        )

    def forward(self, seconds: float, launch: float) -> Callable[[], None]:
        def run() -> None:
            self.now += launch
            self.busy_until = max(self.now, self.busy_until) + seconds

        return run


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    import torch

    card = Card()
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    return card


def test_each_forward_is_told_its_own_time_whoever_ran_before(card: Card) -> None:
    pace, told = Pace("cuda"), dict[str, list[float]]()
    for name, seconds in [("video", 0.6), ("picture", 0.05), ("video", 0.6), ("picture", 0.05)]:
        pace.run(card.forward(seconds, launch=0.0), told.setdefault(name, []).append)
    assert "picture" in told
    assert len(told["picture"]) == 1, "the last one is not over"
    pace.settle()
    pace.settle()
    assert told == {"video": pytest.approx([0.6, 0.6]), "picture": pytest.approx([0.05, 0.05])}


def test_the_host_is_one_forward_ahead_and_no_more(card: Card) -> None:
    pace = Pace("cuda")
    for number in range(1, 5):
        pace.run(card.forward(1.0, launch=0.01), lambda _: None)
        assert card.now == pytest.approx(0.01 if number == 1 else number - 1 + 0.01)


def test_a_forward_that_fails_is_told_to_nobody(card: Card) -> None:
    pace, told = Pace("cuda"), list[float]()
    pace.run(card.forward(1.0, launch=0.0), told.append)
    with pytest.raises(ValueError, match="no"):
        pace.run(lambda: (_ for _ in ()).throw(ValueError("no")), told.append)
    pace.settle()
    assert told == pytest.approx([1.0])


def test_on_a_cpu_the_time_is_told_at_once() -> None:
    told = list[float]()
    assert Pace("cpu").run(lambda: "output", told.append) == "output"
    assert len(told) == 1
