import pytest

from models.writing.completions import CompletionCache, completion_key
from models.writing.language import Completion, FinishReason, Sampling

IDS = [1, 2, 3]


def wrote(text: str, reason: FinishReason = "stop") -> Completion:
    return Completion(text, 3, 4, 1.5, reason)


def test_the_same_question_has_the_same_key() -> None:
    assert completion_key("m", IDS, Sampling(9, 0.7, 0.9, 4)) == completion_key(
        "m", [1, 2, 3], Sampling(9, 0.7, 0.9, 4)
    )


@pytest.mark.parametrize(
    "other",
    [
        completion_key("n", IDS, Sampling(9, 0.7, 0.9, 4)),
        completion_key("m", [1, 2], Sampling(9, 0.7, 0.9, 4)),
        completion_key("m", IDS, Sampling(8, 0.7, 0.9, 4)),
        completion_key("m", IDS, Sampling(9, 0.8, 0.9, 4)),
        completion_key("m", IDS, Sampling(9, 0.7, 0.8, 4)),
        completion_key("m", IDS, Sampling(9, 0.7, 0.9, 5)),
        completion_key("m", IDS, Sampling(9, 0.0, 0.9, 4)),
    ],
)
def test_whatever_decides_the_answer_changes_the_key(other: bytes) -> None:
    assert other != completion_key("m", IDS, Sampling(9, 0.7, 0.9, 4))


def test_a_greedy_answer_depends_on_no_seed() -> None:
    assert completion_key("m", IDS, Sampling(9, 0, 0.9, 4)) == completion_key("m", IDS, Sampling(9, 0, 0.5, 7))


def test_a_known_answer_says_that_it_was_known() -> None:
    cache = CompletionCache(10_000)
    cache.put(b"a", wrote("fox"))
    assert cache.get(b"a") == Completion("fox", 3, 4, 0.0, "stop", cached=True)
    assert cache.get(b"b") is None


def test_the_cache_keeps_the_latest_that_fit() -> None:
    cache = CompletionCache(3 * 1000)
    for name in (b"a", b"b", b"c"):
        cache.put(name, wrote("x" * 400))
    assert cache.get(b"a") is not None
    cache.put(b"d", wrote("x" * 400))
    assert [name for name in (b"a", b"b", b"c", b"d") if cache.get(name)] == [b"a", b"c", b"d"]
    assert cache.bytes == 3000


def test_an_answer_that_is_put_again_counts_once() -> None:
    cache = CompletionCache(10_000)
    cache.put(b"a", wrote("x" * 400))
    cache.put(b"a", wrote("x" * 100))
    assert (len(cache), cache.bytes) == (1, 700)


def test_what_is_no_whole_answer_is_not_kept() -> None:
    cache = CompletionCache(1000)
    cache.put(b"a", wrote("fox", "cancelled"))
    cache.put(b"b", wrote("x" * 1000))
    assert (len(cache), cache.bytes) == (0, 0)
