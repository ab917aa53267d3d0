import random

import pytest

from models.writing.detokenizing import TextStream


def by_bytes(ids: object) -> str:
    """A byte-level decoder: each id is a byte."""
    return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload,no-any-return]


def told(data: bytes) -> list[str]:
    stream = TextStream(by_bytes)
    return [piece for piece in [*(stream.push([byte]) for byte in data), stream.finish()] if piece]


def test_a_character_comes_whole() -> None:
    assert told("aé漢🦊b".encode()) == ["a", "é", "漢", "🦊", "b"]


def test_white_space_around_the_whole_is_left_out() -> None:
    assert told(b"\n  a red\n\nfox \n ") == ["a", " r", "e", "d", "\n\nf", "o", "x"]


def test_half_a_character_at_the_end_is_told_as_such() -> None:
    assert told("fox 🦊".encode()[:-1])[-1].endswith("\ufffd")


@pytest.mark.parametrize("seed", range(40))
def test_the_pieces_joined_are_the_text_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    pool = [*range(32, 127), *b"\n\n\t  ", *"é漢🦊ö".encode(), *range(128, 256)]
    data = bytes(rng.choice(pool) for _ in range(200))
    assert "".join(told(data)) == by_bytes(data).strip()
