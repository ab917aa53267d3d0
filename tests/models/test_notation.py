from collections import Counter

import pytest

from models.prompting.notation import Weight, lost_weights, parts, weights_in, with_compel_weights, with_weights_of


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ("a (red cat:1.3), (sky: 0.8)", "a (red cat)1.3, (sky)0.8"),
        ("a/(cat:1.3)", "a/ (cat)1.3"),
        ("portrait/(cinematic)1.9", "portrait/ (cinematic)1.9"),
        ("[(masterpiece)1.2]", "[ (masterpiece)1.2]"),
        ("a/((cat)1.3 dog)", "a/ ((cat)1.3 dog)"),
        ("(red (fluffy) cat:1.3)", "(red (fluffy) cat)1.3"),
        ("((a:1.2) b:1.1)", "((a)1.2 b)1.1"),
        ("(a:b:1.3)", "(a:b)1.3"),
        ("(word:.5)", "(word).5"),
        ("(portrait - studio light:1.3)", "(portrait -studio light)1.3"),
        ("(1=1 cat)1.3", "(1)1.3 = (1 cat)1.3"),
        ("(cat:2). A dog", "(cat)2 . A dog"),
    ],
)
def test_a_weight_is_written_so_that_compel_reads_it(prompt: str, written: str) -> None:
    assert with_compel_weights(prompt) == written


@pytest.mark.parametrize(
    "prompt",
    [
        "at 10:30 (or later), ratio 16:9",
        "a (cat)1.5, (red (fluffy) cat)1.1 on a mat--, moon++",
        '("a cat", "a (dog)1.2").blend(0.3, 0.7)',
        "cat(s)-like, f(x), cat(dog)",
        r"a face \(smiling:1.3\), a/\(b\)1.2",
        "(16:9)1.2",
        "(((a",
        ")(:",
        "",
    ],
)
def test_what_compel_reads_and_what_is_no_weight_stays_as_it_is(prompt: str) -> None:
    assert with_compel_weights(prompt) == prompt


def test_a_free_piece_is_in_no_brackets_and_is_no_weight() -> None:
    pieces = parts(r'a (b)1.2c "d"++ \(e\)')
    assert pieces == [("a ", True), ("(b)1.2", False), ("c ", True), ('"d"++', False), (r" \(e\)", True)]


def test_weights_are_found_in_each_notation() -> None:
    prompt = 'a (Red  scarf)1.40, (fog:.5), wall--, ((a)1.2 b)1.1, "q r"++, (plain), (c)1, well-known (d.attend(1.5))'
    assert weights_in(prompt) == Counter(
        {
            Weight("red scarf", "1.4"): 1,
            Weight("fog", "0.5"): 1,
            Weight("wall", "--"): 1,
            Weight("a b", "1.1"): 1,
            Weight("q r", "++"): 1,
            Weight(None, ".attend(1.5)"): 1,
        }
    )


def test_a_weight_is_lost_where_it_is_missing_or_another() -> None:
    prompt = "(scarf)1.4, (scarf)1.4, wall--"
    assert lost_weights(prompt, "(scarf:1.4), a wall") == [Weight("scarf", "1.4"), Weight("wall", "--")]
    assert lost_weights(prompt, "wall--, (scarf:1.4), (Scarf)1.4") == []
    assert lost_weights("(scarf)1.4", "(scarf)1.2") == [Weight("scarf", "1.4")]
    assert len(lost_weights('("a", "b").blend(1, 2)', "a and b")) == 1


@pytest.mark.parametrize(
    ("prompt", "answer", "restored"),
    [
        ("(red scarf)1.4, wall--", "A Red  Scarf/brick wall.", "A (Red  Scarf)1.4 /brick (wall)-- ."),
        ("(cat)1.2, (cat tail)1.3", "a cat tail, a cat", "a (cat tail)1.3, a (cat)1.2"),
        ("(scarf)1.4", "a woman (in a scarf), scarfs", "a woman (in a scarf), scarfs"),
        ("(scarf)1.4", "a (scarf)1.4 and a scarf", "a (scarf)1.4 and a scarf"),
    ],
)
def test_weights_are_put_back_on_the_words_that_stand_free(prompt: str, answer: str, restored: str) -> None:
    assert with_weights_of(prompt, answer) == restored
