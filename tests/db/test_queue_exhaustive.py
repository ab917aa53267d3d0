"""The rules of leases, explored to the end: every order in which two replicas, upkeep and a person can act on one job.

The model says in plain Python what the statements of queue.sql guard. All rules together hold their promises in every
state that can be reached; without any one of them the search finds a sequence that breaks one. So the promises can
fail, and none of the rules is idle. That the statements do what the model says is the business of test_queue_model.py.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

MAX_FAILURES = 3
MAX_ATTEMPTS = 5  # drains cost no failure; the search ends somewhere all the same
WORKERS = (0, 1)
RULES = frozenset({"fence", "attempt_grows", "expiry_is_checked_again", "ended_rows_are_gone", "leases_expire"})


@dataclass(frozen=True)
class World:
    """One job, what each replica believes to hold, and what upkeep has read and not acted on yet."""

    status: str = "queued"
    attempt: int = 0
    failures: int = 0
    owner: int | None = None
    lease_live: bool = False
    cancel: bool = False
    held: tuple[int | None, int | None] = (None, None)
    seen_expired: int | None = None
    ends: int = 0
    broken: str | None = None  # the promise that the last step broke


def believes(world: World, worker: int, attempt: int | None) -> tuple[int | None, int | None]:
    return (attempt, world.held[1]) if worker == 0 else (world.held[0], attempt)


def steps(world: World, rules: frozenset[str]) -> Iterator[tuple[str, World]]:
    """Everything that can happen next."""
    if world.status == "queued":
        if world.attempt < MAX_ATTEMPTS:
            for worker in WORKERS:
                if world.held[worker] is None:
                    yield f"claim by {worker}", claim(world, worker, rules)
        yield "cancel", end(world, "cancelled")
    if world.status == "processing":
        yield "cancel", replace(world, cancel=True)
        if world.lease_live and "leases_expire" in rules:
            yield "lease runs out", replace(world, lease_live=False)
        if not world.lease_live:
            yield "upkeep reads", replace(world, seen_expired=world.attempt)
    for worker in WORKERS:
        if world.held[worker] is not None:
            yield from reports(world, worker, rules)
    if world.seen_expired is not None:
        yield "upkeep rescues", rescue(world, rules)


def claim(world: World, worker: int, rules: frozenset[str]) -> World:
    attempt = world.attempt + 1 if "attempt_grows" in rules else 1
    return replace(
        world,
        status="processing",
        attempt=attempt,
        owner=worker,
        lease_live=True,
        held=believes(world, worker, attempt),
    )


def reports(world: World, worker: int, rules: frozenset[str]) -> Iterator[tuple[str, World]]:
    """What a replica that believes to hold the job may write, also one that slept and comes back late."""
    attempt = world.held[worker]
    free = replace(world, held=believes(world, worker, None))
    open_row = world.status == "processing" or ("ended_rows_are_gone" not in rules and world.status != "queued")
    mine = open_row and (attempt == world.attempt or "fence" not in rules)
    yield f"{worker} dies", free
    if not mine:
        yield f"{worker} writes late, in vain", free
        return
    wrong = None if world.owner == worker else "a replica wrote that does not own the job"
    if attempt == world.attempt and world.owner == worker:
        yield f"{worker} renews", replace(world, lease_live=True)
    yield f"{worker} completes", end(free, "completed", wrong)
    if world.cancel:
        yield f"{worker} stops", end(free, "cancelled", wrong)
        return
    yield f"{worker} drains", back(free, 0, wrong)
    if world.failures + 1 < MAX_FAILURES:
        yield f"{worker} fails", back(free, 1, wrong)
    else:
        yield f"{worker} fails for good", end(replace(free, failures=world.failures + 1), "failed", wrong)


def rescue(world: World, rules: frozenset[str]) -> World:
    idle = replace(world, seen_expired=None)
    still_out = not world.lease_live or "expiry_is_checked_again" not in rules
    if world.status != "processing" or world.attempt != world.seen_expired or not still_out:
        return idle
    wrong = "a job was taken from a replica whose lease lives" if world.lease_live else None
    if world.cancel:
        return end(idle, "cancelled", wrong)
    if world.failures + 1 < MAX_FAILURES:
        return back(idle, 1, wrong)
    return end(replace(idle, failures=world.failures + 1), "failed", wrong)


def end(world: World, status: str, wrong: str | None = None) -> World:
    twice = "an ended job ended again" if world.ends else None
    return replace(
        world,
        status=status,
        owner=None,
        lease_live=False,
        cancel=False,
        ends=min(world.ends + 1, 2),
        broken=wrong or twice,
    )


def back(world: World, counts: int, wrong: str | None = None) -> World:
    reopened = "an ended job was put back" if world.ends else None
    return replace(
        world, status="queued", owner=None, lease_live=False, failures=world.failures + counts, broken=wrong or reopened
    )


def explore(rules: frozenset[str]) -> tuple[dict[World, tuple[World, str] | None], World | None]:
    """Breadth first: every world with the step that led to it, and the first that breaks a promise."""
    start = World()
    came_from: dict[World, tuple[World, str] | None] = {start: None}
    waiting = deque([start])
    while waiting:
        world = waiting.popleft()
        for name, after in steps(world, rules):
            if after in came_from:
                continue
            came_from[after] = (world, name)
            if after.broken:
                return came_from, after
            waiting.append(after)
    return came_from, None


def story(came_from: dict[World, tuple[World, str] | None], last: World) -> list[str]:
    """The shortest way to a world."""
    names = []
    while (step := came_from[last]) is not None:
        last, name = step
        names.append(name)
    return names[::-1]


def wedged(worlds: dict[World, tuple[World, str] | None], rules: frozenset[str]) -> World | None:
    """A world from which no end can be reached any more."""
    before: dict[World, set[World]] = {}
    for world in worlds:
        for _, after in steps(world, rules):
            before.setdefault(after, set()).add(world)
    good = {world for world in worlds if world.ends}
    waiting = deque(good)
    while waiting:
        for earlier in before.get(waiting.popleft(), ()):
            if earlier not in good:
                good.add(earlier)
                waiting.append(earlier)
    # every replica may die, so what only a replica could end may never end
    return next((w for w in worlds if w not in good or (not w.ends and stuck_when_all_die(w, rules))), None)


def stuck_when_all_die(world: World, rules: frozenset[str]) -> bool:
    """Whether a running job stays running for ever once no replica writes any more."""
    if world.status != "processing":
        return False
    alone = replace(world, held=(None, None))
    return not any(name in ("lease runs out", "upkeep reads", "upkeep rescues") for name, _ in steps(alone, rules))


def test_all_rules_together_keep_every_promise() -> None:
    worlds, broken = explore(RULES)
    assert broken is None, story(worlds, broken)
    assert wedged(worlds, RULES) is None
    # the search has been where it must have been
    assert {world.status for world in worlds} == {"queued", "processing", "completed", "failed", "cancelled"}
    assert {world.attempt for world in worlds} == set(range(MAX_ATTEMPTS + 1))
    assert max(world.failures for world in worlds) == MAX_FAILURES
    assert any(None not in world.held and world.held[0] != world.held[1] for world in worlds), "no zombie was met"


@pytest.mark.parametrize("rule", sorted(RULES - {"leases_expire"}))
def test_without_one_rule_a_promise_breaks(rule: str) -> None:
    worlds, broken = explore(RULES - {rule})
    assert broken is not None
    assert story(worlds, broken)


def test_without_expiry_a_dead_replica_holds_its_job_for_ever() -> None:
    rules = RULES - {"leases_expire"}
    worlds, broken = explore(rules)
    assert broken is None
    assert wedged(worlds, rules) is not None


def test_without_the_fence_the_shortest_story_is_the_zombie() -> None:
    worlds, broken = explore(RULES - {"fence"})
    assert broken is not None
    assert broken.broken == "a replica wrote that does not own the job"
    names = story(worlds, broken)
    assert names[:4] == ["claim by 0", "lease runs out", "upkeep reads", "upkeep rescues"]
    assert names[4].startswith("claim by")
