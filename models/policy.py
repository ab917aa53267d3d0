"""The content policy, which no setting changes.

Two rules, for every text that will be drawn, the enhanced prompt as well as the caller's own:

* sexual content with minors is refused in every mode (`content_minors`). A sign of a minor and a sign of sexual
  content anywhere in one text are enough; in nsfw mode the mode itself is the second sign, so a text that shows
  minors by an unmistakable word or age runs in sfw mode only;
* sexual content is refused in sfw mode (`content_sexual_in_sfw`).

A picture that something is made from counts with the words that it was made from itself: `signs_kept` tells them, and
what was made keeps them as `Signs`.

Negative prompts name what shall *not* appear: "child, nude" is right there, so they are not given to
`check_prompt`. Guard terms in them are wanted. Whether the caller may use nsfw mode is decided elsewhere.

It is a filter of words: English, Spanish, German, French, Portuguese, Italian, Russian, Japanese, Chinese and
some Korean. It sees through look-alike letters, digits for letters, split and stretched words; it judges no
pictures, and words that are not in `models.prompting.vocabulary` pass.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from pydantic import ValidationError

from models.catalog import RequestRefused
from models.guiding.reference import WithReferences
from models.params import ContentMode, GenerationParams
from models.prompting import vocabulary
from models.prompting.signs import Sign, Signs


class ContentRejected(RequestRefused):
    """The text breaks the content policy. `code`: content_minors or content_sexual_in_sfw."""


NO_SIGNS: Final = Signs()


def check_prompt(text: str, content_mode: ContentMode, beside: Signs = NO_SIGNS) -> None:
    """Passes or raises `ContentRejected`. `beside` are the signs of what will be drawn together with the text. Linear
    in the text, about a millisecond per hundred words."""
    check_signs(signs_in(text) | beside, content_mode)


def check_signs(found: Signs, content_mode: ContentMode) -> None:
    """Passes or raises `ContentRejected`, for all that is drawn together."""
    if (found.minors and found.sexual) or (content_mode == "nsfw" and found.minors == Sign.STRONG):
        if found.sexual:
            message = "sexual content that involves minors is never made"
        else:
            message = "prompts that show minors run in content mode sfw only"
        raise ContentRejected("content_minors", message)
    if content_mode == "sfw" and found.sexual == Sign.STRONG:
        raise ContentRejected("content_sexual_in_sfw", "sexual content is not made in content mode sfw")


def with_weighted_terms(prompt: str, params: GenerationParams) -> str:
    """A prompt with the terms that its weights may add, as the content policy has to read it."""
    terms = params.compel_weights.wording if params.compel_weights else ""
    return f"{prompt}, {terms}" if terms else prompt


def signs_kept(params: Mapping[str, Any], *prompts: str | None) -> Signs:
    """The signs of what a generation shows, by its params as a row has them: of all prompts that it was asked by, and
    of its references. Where the params are those of no generation, the prompts alone speak."""
    try:
        asked = GenerationParams.model_validate(params)
    except ValidationError:
        return signs_in(", ".join(filter(None, prompts)))
    signs = signs_beside(asked)
    for prompt in prompts:
        signs |= signs_in(with_weighted_terms(prompt or "", asked))
    return signs


def signs_beside(params: WithReferences) -> Signs:
    """The signs of the references of a generation."""
    signs = NO_SIGNS
    for reference in params.references:
        signs |= reference.signs
    return signs


def signs_in(text: str) -> Signs:
    """The signs over all readings of a text."""
    minors, sexual = Sign.NONE, Sign.NONE
    for reading in _readings(text):
        if _INHERENT.search(reading):
            return Signs(minors=Sign.STRONG, sexual=Sign.STRONG)
        words = _INNOCENT.sub(" ", reading)
        minors = max(minors, _sign(words, _MINOR_STRONG, _MINOR_WEAK), _age_sign(words), _german_boy(words))
        sexual = max(sexual, _sign(words, _SEXUAL_STRONG, _SEXUAL_WEAK))
    return Signs(minors=minors, sexual=sexual)


def _german_boy(words: str) -> Sign:
    return Sign.WEAK if _GERMAN_BOY.search(words) else Sign.NONE


def _sign(words: str, strong: re.Pattern[str], weak: re.Pattern[str]) -> Sign:
    if strong.search(words):
        return Sign.STRONG
    return Sign.WEAK if weak.search(words) else Sign.NONE


# --- readings: one text as the several ways it may be meant -----------------------------------------------

_KEPT_MARKS: Final = "\u3099\u309a"  # the voicing marks of kana are part of the letter
_FILLERS: Final = dict.fromkeys(map(ord, "\u115f\u1160\u3164\uffa0\u2800"), "")
_LOOKALIKES: Final = str.maketrans(
    "абвсеһіјкмнорԛѕтухԝүαβεηικνορτυχɑɡıłøđʀɴɪʟʙɢʜ@$ᴀᴄᴅᴇᴊᴋᴍᴏᴘꜱᴛᴜᴠᴡʏᴢꜰԁոսհօցŋɳɲʋɗ℮ꓐꓑꓓꓔꓖꓗꓙꓚꓜꓝꓟꓠꓡꓢꓣꓦꓧꓪꓫꓬꓮꓰꓲꓳꓴ",
    "abbcehijkmhopqstyxwyabenikvoptuxagilodrnilbghasacdejkmopstuvwyzfdnuhognnnudebpdtgkjczfmnlsrvhwxyaeiou",
)
_DIGIT_LETTERS: Final = str.maketrans("0134578", "oieastb")
_LETTER_ENCLOSURES: Final = (0x1F150, 0x1F170, 0x1F1E6)  # negative circled, negative squared, regional
_BETWEEN_LETTERS: Final = re.compile(r"(?<=[^\W_])[^\w\s]+(?=[^\W_])|_+")
_BANG_I: Final = re.compile(r"(?<=[^\W\d_])!(?=[^\W\d_])")
_SINGLES: Final = re.compile(r"(?<![^ ])[^\W\d_](?: [^\W\d_]){2,}(?![^ ])")
_STRETCHED: Final = re.compile(r"([^\W\d_])\1{2,}")
_RANGE: Final = re.compile(r"(?<=\d)\s*[-‐-―~]\s*(?=\d)")


def _fold(text: str) -> str:
    """Lower case, compatibility forms and accents folded, invisible characters dropped; ñ stays."""
    letters = "".join(_enclosed_letter(character) for character in text.translate(_FILLERS))
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", letters).casefold())
    kept: list[str] = []
    for character in decomposed:
        category = unicodedata.category(character)
        if category == "Cf":
            continue
        if category in ("Mn", "Me"):
            tilde_of_n = character == "\u0303" and kept and kept[-1] == "n"
            if character not in _KEPT_MARKS and not tilde_of_n:
                continue
        if category == "Nd":
            character = str(unicodedata.digit(character))
        kept.append(character)
    return unicodedata.normalize("NFKC", "".join(kept))


def _enclosed_letter(character: str) -> str:
    for start in _LETTER_ENCLOSURES:
        if start <= ord(character) < start + 26:
            return chr(ord("a") + ord(character) - start)
    return character


def _spaced(text: str) -> str:
    """Words separated by one space each; punctuation gone, pictographs kept as words."""
    kept = (c if c.isalnum() else f" {c} " if unicodedata.category(c) == "So" else " " for c in text)
    return " ".join("".join(kept).split())


def _readings(text: str) -> Iterator[str]:
    folded = _fold(text)
    seen: set[str] = set()
    for plain in (_RANGE.sub(" to ", folded), folded.translate(_LOOKALIKES)):
        closed = _BETWEEN_LETTERS.sub("", _BANG_I.sub("i", plain))
        for spelled in (plain, closed, *_digits_as_letters(closed)):
            words = _spaced(spelled)
            for reading in (words, _SINGLES.sub(_joined, words), _STRETCHED.sub(r"\1", words)):
                if reading not in seen:
                    seen.add(reading)
                    yield reading


def _digits_as_letters(text: str) -> tuple[str, str]:
    spelled = " ".join(
        word.translate(_DIGIT_LETTERS) if any(character.isalpha() for character in word) else word
        for word in text.split()
    )
    as_l = " ".join(
        word.replace("1", "l").translate(_DIGIT_LETTERS) if any(map(str.isalpha, word)) else word
        for word in text.split()
    )
    return spelled, as_l


def _joined(singles: re.Match[str]) -> str:
    """Single letters as one word, with and without a letter at either end that may be an article; then the terms that
    stand in it, since the borders of several words spelled out in a row are gone. A short run is one word."""
    word = singles.group().replace(" ", "")
    inside = (match[1] for match in _SPELLED_OUT.finditer(word)) if len(word) >= 8 else ()
    return " ".join((word, word[1:], word[:-1], word[1:-1], *inside))


# --- terms ----------------------------------------------------------------------------------------------


def _pattern(terms: Iterable[str]) -> re.Pattern[str]:
    """One pattern for all terms: whole words where words are spaced, substrings elsewhere.

    A single long word matches with a space in it too ("tod dler"), unless its pieces are words ("pen is").
    """
    spaced: set[str] = set()
    unspaced: set[str] = set()
    for term in terms:
        stem = _spaced(_fold(term.removesuffix("*")))
        ending = "[^ ]*" if term.endswith("*") else ""
        if not all(ord(character) < 0x0530 for character in stem):
            unspaced.add(re.escape(stem) + ending)
        elif len(stem) >= 5 and " " not in stem and stem not in ("penis", "nudes", "menor"):
            spaced.add(" ?".join(stem) + ending)
        else:
            # "child's pose" is two readings: with the apostrophe as a space, and without it.
            spaced |= {re.escape(stem) + ending, re.escape(stem.replace(" s ", "s ")) + ending}
    whole = rf"(?<![^ ])(?:{'|'.join(sorted(spaced, key=lambda term: (-len(term), term)))})(?![^ ])"
    return re.compile("|".join([whole, *sorted(unspaced)]))


def _stems(*vocabularies: Iterable[str]) -> re.Pattern[str]:
    """Where a single word of at least four letters begins; the longest one there."""
    terms = {_spaced(_fold(term.removesuffix("*"))) for terms in vocabularies for term in terms}
    stems = sorted((term for term in terms if len(term) >= 4 and " " not in term), key=lambda stem: (-len(stem), stem))
    return re.compile(f"(?=({'|'.join(map(re.escape, stems))}))")


_SPELLED_OUT: Final = _stems(vocabulary.MINOR_STRONG, vocabulary.SEXUAL_STRONG)
_INHERENT: Final = _pattern(vocabulary.INHERENT)
_INNOCENT: Final = _pattern(vocabulary.INNOCENT)
_MINOR_STRONG: Final = _pattern(vocabulary.MINOR_STRONG)
_MINOR_WEAK: Final = _pattern(vocabulary.MINOR_WEAK)
_SEXUAL_STRONG: Final = _pattern(vocabulary.SEXUAL_STRONG)
_SEXUAL_WEAK: Final = _pattern(vocabulary.SEXUAL_WEAK)

# "Junge" is a boy, or "young" before a noun of the adults that it is said of.
_GERMAN_BOY: Final = re.compile(
    r"(?<![^ ])junge(?! madchen)"
    r"(?! (?:[^ ]+e )?(?:frau|dame|leute|mann|manner|erwachsene|mutter|model|paar|tanzerin)(?:e?n)?(?![^ ]))(?![^ ])"
)


# --- ages -----------------------------------------------------------------------------------------------

_ADULT: Final = 18
_NUMBER_WORDS: Final = {_fold(word): value for value, words in vocabulary.NUMBERS.items() for word in words.split()}
_TEN_WORDS: Final = frozenset(_fold(word) for word in vocabulary.TENS)
_IDEOGRAPHS: Final = {character: value for value, character in enumerate("〇一二三四五六七八九十")}
_IDEOGRAPH_AGE: Final = re.compile(r"([〇一二三四五六七八九十]{1,3})(?=[歳才岁歲])")
_FRENCH_ADULT: Final = re.compile(r"(?<![^ ])dix (?:huit|neuf)(?![^ ])")
_JOINED_AGE: Final = re.compile(r"^(\D+?)(jahrig\w*|jaehrig\w*|летн\w*)$")
_MISREAD_DIGITS: Final = re.compile(r"(?<![^ ])(?=[oil]*\d)([\doil]{2})(?=(?:y|yo|yrs?|years?)?(?![^ ]))")
_AS_DIGITS: Final = str.maketrans("oil", "011")

_N: Final = r"(?<!\d)(?:(?P<low>\d{1,2}) (?:to|or|and|bis|a|o|y) )?(?P<age>\d{1,2}) ?"
_UNITS: Final = "feet|foot|ft|cm|meter|metre|m|km|kg|degrees|seconds|minutes|hours|people|times|percent|of"
_NOT_A_COUNT: Final = rf"(?! (?:to|or)? ?\d|\d| (?:{_UNITS})(?![^ ]))"
_SCHOOL_YEAR: Final = (
    r"(?<![^ ])(?:(?:[1-9]|1[0-2])(?:st|nd|rd|th)?|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth"
    r"|eleventh|twelfth)"
)
_AGES_STRONG: Final = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?<![^ ]){_N}(?:years?|yrs?|yr|y|months?|weeks?|days?) ?(?:old|olds|young|of age|o)(?![^ ])",
        rf"(?<![^ ]){_N}(?:yo|yos|yrold|yearold)(?![^ ])",
        rf"(?<![^ ])(?:age|aged|ages)(?: of| is| about| around| only| just| between)? {_N}(?![^ ]){_NOT_A_COUNT}",
        rf"(?<![^ ]){_N}(?:jahre? (?:alt|jung)|jahrig[^ ]*|jaehrig[^ ]*|летн[^ ]*)",
        rf"(?<![^ ])(?:de|d|tiene|avec|ha|tem|con|di|von|mit|en) {_N}(?:a[nñ]os|ans|anni|jahren?)(?![^ ])",
        r"(?<!\d)(?P<age>\d{1,2}) ?(?:[歳才岁歲살]|세(?!기))",
        r"(?<![^ ])(?:under|below|younger than|less than|menor de|menores de|unter|moins de|младше|до)"
        rf"(?: the)?(?: age of)? 1[0-8](?![^ ]){_NOT_A_COUNT}",
        r"(?<!\d)1[0-8](?:歳未満|岁以下|歲以下|세 ?미만)|未满1[0-8]岁",
        rf"{_SCHOOL_YEAR} grader[^ ]*",
    )
)
_AGES_WEAK: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<![^ ])(?:girl|boy|woman|man|female|male|she|he|they|daughter|son|student|model)s?"
        rf"(?: (?:is|s|are|was|of|who|only|just|aged|about|turned|turning))+ {_N}(?![^ ]){_NOT_A_COUNT}",
        rf"(?<![^ ])(?:girl|boy|daughter|son|student)s? (?P<age>1[0-7])(?![^ ]){_NOT_A_COUNT}",
        r"(?<![^ ])(?:woman|man|female|male|model) (?P<age>1[0-7])$",
        rf"(?<!hace )(?<!y a )(?<!vor )(?<![^ ]){_N}(?:a[nñ]os|ans|anni|jahre|лет|года?|years?|yrs?)"
        r"(?! (?:after|before|later|ago|since|of|in|despues|nach|apres|dopo)(?![^ ]))(?![^ ])",
        r"(?<![^ ])(?P<age>1[0-7]) ?f(?![^ ])",
        rf"(?<![^ ])(?:turn(?:s|ed|ing)?|just) {_N}(?![^ ]){_NOT_A_COUNT}",
        r"(?<![^ ])(?P<age>\d{1,2})(?:st|nd|rd|th) birthday",
        rf"{_SCHOOL_YEAR} grades?(?![^ ])",
    )
)


def _age_sign(words: str) -> Sign:
    """Strong where the text states an age under 18 of what may be a person."""
    read = _with_digits(words)
    for sign, patterns in ((Sign.STRONG, _AGES_STRONG), (Sign.WEAK, _AGES_WEAK)):
        for pattern in patterns:
            for match in pattern.finditer(read):
                if _is_minors(match) and not _is_things(read, match):
                    return sign
    return Sign.NONE


def _with_digits(words: str) -> str:
    """Ages in figures: number words, ideographs, and letters that stand for digits ("1o yo")."""
    words = _FRENCH_ADULT.sub("99", words)
    words = _IDEOGRAPH_AGE.sub(lambda match: str(_ideograph_value(match.group())), words)
    words = _MISREAD_DIGITS.sub(lambda match: match.group().translate(_AS_DIGITS), words)
    figures: list[str] = []
    after_ten = False
    for word in words.split():
        compound = _JOINED_AGE.match(word)
        if compound and compound[1] in _NUMBER_WORDS:
            figures += [str(_NUMBER_WORDS[compound[1]]), compound[2]]
        elif word in _NUMBER_WORDS and after_ten:
            figures[-1] = "99"  # "twenty one" is no "one"; which number above 17 it is does not matter
        elif word in _NUMBER_WORDS:
            figures.append(str(_NUMBER_WORDS[word]))
        elif word in _TEN_WORDS:
            figures.append("99")
        elif after_ten and word in ("and", "y", "et", "e"):
            continue
        else:
            figures.append(word)
        after_ten = word in _TEN_WORDS
    return " ".join(figures)


def _ideograph_value(figures: str) -> int:
    if "十" not in figures:
        return int("".join(str(_IDEOGRAPHS[character]) for character in figures))
    tens, _, ones = figures.partition("十")
    return (_IDEOGRAPHS[tens] if tens else 1) * 10 + (_IDEOGRAPHS[ones] if ones else 0)


def _is_minors(match: re.Match[str]) -> bool:
    groups = match.groupdict()
    if "age" not in groups:
        return True
    counted_in_years = not re.search(r"months?|weeks?|days?", match.group())
    stated = [int(groups[name]) for name in ("low", "age") if groups.get(name)]
    return not counted_in_years or any(age < _ADULT for age in stated)


def _is_things(words: str, match: re.Match[str]) -> bool:
    """Whether the age is that of an old thing, as in "a 16 year old oak" or "whisky aged 12 years"."""
    before, after = words[: match.start()].split()[-4:], words[match.end() :].split()[:6]
    if vocabulary.PEOPLE & {*before, *after}:
        return False
    return bool(vocabulary.AGED_THINGS & {*before, *after[:3]})
