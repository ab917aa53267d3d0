"""The order of steps, without an engine."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import pytest

from models.denoising.order import AGEING, PATIENCE_SECONDS, Order, Work

A = Work(key="a", rows=2, remaining=10.0, waited=0.0)


def choose(order: Order, works: Sequence[Work], cap: int = 8, seconds: float = 0.1) -> list[int]:
    return order.choose(works, lambda key: cap, lambda key, rows: seconds)


def shares(works: Sequence[Work], seconds: dict[Hashable, float], turns: int) -> dict[Hashable, float]:
    """The time that each key gets when these works want forwards all the time."""
    order, spent = Order(), dict.fromkeys(seconds, 0.0)
    for _ in range(turns):
        chosen = order.choose(works, lambda key: 100, lambda key, rows: seconds[key])
        spent[works[chosen[0]].key] += seconds[works[chosen[0]].key]
    return spent


def test_nothing_to_choose_from_is_nothing_chosen() -> None:
    assert choose(Order(), []) == []


def test_least_remaining_work_goes_first_and_others_fill_the_forward() -> None:
    works = [replace(A, remaining=seconds) for seconds in (5.0, 1.0, 3.0, 4.0)]
    assert choose(Order(), works, cap=2) == [1]
    assert choose(Order(), works, cap=6) == [1, 2, 3]
    assert sorted(choose(Order(), works, cap=100)) == [0, 1, 2, 3]


def test_request_larger_than_the_cap_runs_alone() -> None:
    works = [replace(A, rows=12, remaining=1.0), replace(A, remaining=2.0)]
    assert choose(Order(), works, cap=8) == [0]


def test_what_has_room_fills_up_behind_what_has_none() -> None:
    works = [replace(A, rows=4, remaining=1.0), replace(A, rows=6, remaining=2.0), replace(A, rows=2, remaining=3.0)]
    assert choose(Order(), works, cap=6) == [0, 2]


def test_waiting_makes_up_for_remaining_work() -> None:
    waited = 9.0 / AGEING
    works = [replace(A, remaining=10.0, waited=waited + 1), replace(A, remaining=1.0)]
    assert choose(Order(), works, cap=2) == [0]
    assert choose(Order(), [replace(works[0], waited=waited - 1), works[1]], cap=2) == [1]


def test_deadline_that_needs_it_goes_first_and_one_that_is_lost_does_not() -> None:
    short = replace(A, remaining=1.0)
    for deadline, first in ((12.0, 1), (100.0, 0), (9.0, 0)):
        assert choose(Order(), [short, replace(A, remaining=10.0, deadline=deadline)], cap=2) == [first]


def test_background_gives_way_but_not_for_ever() -> None:
    background = replace(A, key="b", remaining=0.1, priority=1)
    order = Order()
    assert choose(order, [A, background]) == [0]
    assert choose(order, [background]) == [0]
    patient = replace(background, idle=PATIENCE_SECONDS)
    served = {works for _ in range(50) for works in choose(order, [A, patient])}
    assert served == {0, 1}


def test_shapes_share_the_time_whatever_a_step_costs() -> None:
    spent = shares([A, replace(A, key="b")], {"a": 0.05, "b": 1.0}, turns=2000)
    assert 0.9 < spent["a"] / spent["b"] < 1.1


def test_shape_with_more_requests_gets_more_time() -> None:
    works = [A, A, A, replace(A, key="b")]
    spent = shares(works, {"a": 0.1, "b": 0.1}, turns=2000)
    assert 2.7 < spent["a"] / spent["b"] < 3.3


def test_new_shape_comes_first() -> None:
    order = Order()
    for _ in range(5):
        choose(order, [A])
    assert choose(order, [A, replace(A, key="b", remaining=99.0)]) == [1]


def test_no_request_waits_for_ever() -> None:
    """Long requests among ever new short ones: each of them is served again and again."""
    order, idle = Order(), [0.0] * 3
    longest = 0.0
    for turn in range(3000):
        short = replace(A, rows=2, remaining=0.5)
        works = [short, *(replace(A, remaining=60.0, waited=turn * 0.1, idle=seconds) for seconds in idle)]
        chosen = set(choose(order, works, cap=2, seconds=0.1))
        idle = [0.0 if number + 1 in chosen else seconds + 0.1 for number, seconds in enumerate(idle)]
        longest = max(longest, *idle)
    assert longest <= PATIENCE_SECONDS + 1


@pytest.mark.parametrize("beside", [1, 3])
def test_ever_new_shapes_keep_no_old_one_waiting(beside: int) -> None:
    """Jobs of four steps each, every one of a shape of its own, as `reproducible` ones are."""
    order, turns = Order(), 4000
    left: dict[int, int] = {}
    newest = 0

    def arrivals() -> list[Work]:
        nonlocal newest
        for key in [key for key, steps in left.items() if not steps]:
            del left[key]
        while len(left) < beside:
            newest += 1
            left[newest] = 4
        return [replace(A, key=key, remaining=0.05 * steps) for key, steps in left.items()]

    now = longest = idle_since = 0.0
    steps = 0
    for _ in range(turns):
        works = [replace(A, key="old", waited=now, idle=now - idle_since), *arrivals()]
        longest = max(longest, now - idle_since)
        now += 0.05
        (chosen,) = choose(order, works, seconds=0.05)
        if chosen == 0:
            steps, idle_since = steps + 1, now
        else:
            left[int(str(works[chosen].key))] -= 1
    assert steps >= 0.8 * turns / (beside + 1)  # about what each of them gets
    assert longest <= 2 * (beside + 1) * 4 * 0.05


def test_shape_that_changes_at_every_step_gets_its_share_and_no_more() -> None:
    """As that of a request with a ControlNet, whose forwards take turns with the denoiser's."""
    order, spent = Order(), [0, 0]
    for _ in range(2000):
        part = ("net", "unet")[spent[1] % 2]
        (chosen,) = choose(order, [A, replace(A, key=part)], seconds=0.05)
        spent[chosen] += 1
    assert 0.7 < spent[0] / spent[1] < 1.5


def test_reachable_deadline_reaches_across_shapes() -> None:
    order, now, left = Order(), 0.0, 40
    others = [Work("b", 2, remaining=1.0, waited=0.0) for _ in range(7)]
    while left:
        works = [Work("a", 2, remaining=0.05 * left, waited=now, deadline=3.0 - now), *others]
        left -= 0 in choose(order, works, cap=2, seconds=0.05)
        now += 0.05
    assert now <= 3.0


def test_deadline_is_kept_beside_forwards_that_take_long() -> None:
    order, now, left = Order(), 0.0, 40
    while left:
        works = [Work("a", 2, remaining=0.05 * left, waited=now, deadline=6.0 - now), replace(A, key="video")]
        chosen = order.choose(works, lambda key: 2, lambda key, rows: 2.0 if key == "video" else 0.05)
        left -= 0 in chosen
        now += 0.05 if 0 in chosen else 2.0
    assert now <= 6.0


def test_deadline_that_is_lost_or_far_takes_no_turn_of_other_shapes() -> None:
    for deadline in (1.0, 1000.0):
        order, served = Order(), [0, 0]
        for _ in range(200):
            (chosen,) = choose(order, [A, replace(A, key="b", deadline=deadline)], seconds=0.05)
            served[chosen] += 1
        assert abs(served[0] - served[1]) <= 8


def test_deadlines_keep_no_other_shape_waiting_past_patience() -> None:
    order, idle, longest = Order(), 0.0, 0.0
    for _ in range(4000):
        works = [replace(A, idle=idle), replace(A, key="b", deadline=15.0)]
        idle = 0.0 if 0 in choose(order, works) else idle + 0.1
        longest = max(longest, idle)
    assert PATIENCE_SECONDS - 1 < longest <= PATIENCE_SECONDS + 1


def test_shape_of_a_deadline_goes_first_with_the_request_that_has_it() -> None:
    """A long forward of another shape could come in between, so it is urgent, though not among its own."""
    pressed, short = replace(A, deadline=21.0), replace(A, remaining=0.5)
    works = [replace(A, key="video"), short, pressed]
    for _ in range(10):
        assert Order().choose(works, lambda key: 2, lambda key, _: 3.0 if key == "video" else 0.1) == [2]
