"""A job in a replica's hands: where its work is, whether it advances, and why it must stop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from db.queue import Claim

# How long a phase may go without a sign of progress before its lease is no longer renewed, in seconds.
# `denoise` counts from step to step; the others from their beginning.
PHASE_ALLOWANCE = {"waiting": 3600.0, "encode": 300.0, "denoise": 300.0, "decode": 600.0, "encode_media": 300.0}
DEFAULT_ALLOWANCE = 300.0


class StopReason(StrEnum):
    """Why a job in our hands must stop."""

    USER = "user"  # somebody cancelled it
    DEADLINE = "deadline"  # its total deadline passed
    LOST = "lost"  # the lease is somebody else's now
    DRAIN = "drain"  # this replica is going away


@dataclass
class Held:
    """A job in this replica's hands. `report` and `leave_slot` are called by the work, `stop` by the loop."""

    claim: Claim
    phase: str = "waiting"
    step: int | None = None
    steps: int | None = None
    activity: int = 0
    stop_reason: StopReason | None = None
    lost_at: float | None = None
    on_stop: Callable[[], None] | None = None
    in_slot: bool = True
    on_leave: Callable[[], None] | None = None
    settling: bool = False  # the end is being written: that the job is missing then proves nothing
    # on this process' own clock: when the lease ends at the latest, and when the work last showed progress
    lease_ends: float = field(default_factory=time.monotonic)
    advanced: float = field(default_factory=time.monotonic)
    preview: tuple[int, int] | None = None  # the latest preview that can be seen: its step, and of how many
    reported: tuple[object, ...] | None = None

    def report(
        self, phase: str, step: int | None = None, steps: int | None = None, activity: int | None = None
    ) -> None:
        """The work is in this phase, at this step. Any change, of `activity` too, counts as progress."""
        before = (self.phase, self.step, self.activity)
        self.phase, self.step, self.steps = phase, step, steps
        if activity is not None:
            self.activity = activity
        if (self.phase, self.step, self.activity) != before:
            self.advanced = time.monotonic()

    def leave_slot(self) -> None:
        """The model is free for another job; what is left of this one is to encode, store and settle. To be called
        again changes nothing."""
        was_in_slot, self.in_slot = self.in_slot, False
        if was_in_slot and self.on_leave is not None:
            self.on_leave()

    def stop(self, reason: StopReason) -> None:
        """Make the work stop at its next step. The first reason stands, but a lost lease overrules all."""
        if self.stop_reason is None or reason is StopReason.LOST:
            self.stop_reason = reason
        if self.on_stop is not None:
            self.on_stop()

    @property
    def news(self) -> tuple[object, ...]:
        """What watchers of the job are to learn."""
        return self.phase, self.step, self.preview

    @property
    def stalled(self) -> bool:
        """Whether the work has shown no progress for longer than its phase allows."""
        return time.monotonic() - self.advanced > PHASE_ALLOWANCE.get(self.phase, DEFAULT_ALLOWANCE)
