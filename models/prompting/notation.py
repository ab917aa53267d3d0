"""Weights in the text of a prompt: Compel's "(word)1.3", "word++" and "(word)--", and "(word:1.3)" of other programs.

Compel reads a bracket at the outermost level only behind white space, a comma or another group, and takes anything
else for text, brackets and numbers included. So weights are rewritten here until Compel does read them, and what still
stands there as text can be found. All of this is linear in the text and needs no parser.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

SPACE = " \t\r\n"  # what Compel takes for white space
CONJUNCTION = re.compile(r"\)\s*\.(?:blend|and|add)\s*\(")
OPERATOR = re.compile(r"(?<!\\)\.(?:and|add|blend|attend|swap)\s*\([^()]*\)")

_ESCAPED = re.compile(r"\\[()\"]")
_HIDDEN = "\ue000\ue000"  # of the private use area: no letter, no space, no sign of Compel's
_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_WEIGHT = re.compile(rf"\+++(?!\w)|-++(?!\w)|{_NUMBER}")
_COLON_WEIGHT = re.compile(r"(?<=[^\s:])\s*:\s*(\d+(?:\.\d*)?|\.\d+)\s*$")
_LONGEST_NUMBER = 40  # with what stands around it
_LONE_DASH = re.compile(r"(?<![^\s(])([-+])\s+(?=\w)")
_TRAILING_DASH = re.compile(r"(?<=\w)-(?=\s)")
_PIECE = re.compile(r"[()]|[^()]+")
_SIGNED = re.compile(r"(?<![^\s,.()\"=])([^\s,.()\"+=-](?:[^\s,.()\"+=]*[^\s,.()\"+=-])?)(\+++|-++)(?=[\s,.;)]|$)")
_QUOTED = re.compile(rf'"([^"]+)"(\+++(?!\w)|-++(?!\w)|{_NUMBER})')

# What Compel left as text: a weight behind a bracket or quotation mark, and an operator.
_LEFT_OVER = re.compile(r"[)\"](?:\.?\d|\+|-(?!\w))|(?<=\w)(?:\+{2,}|-{2,})(?![\w+-])|\.(?:and|add|blend|attend)\s*\(")
# A weight behind a colon, in brackets of any kind or at the end of a phrase. "16:9" and "at: 1.5" are none.
_NAMED = r"(?<![\w.-])(?=[\w.-]*[^\W\d])[\w.-]+"
_UNREAD_COLON = re.compile(
    rf":\s*[+-]?\.?\d[\d.,]*\s*\)(?!\w)|{_NAMED}\s*:\s*[+-]?\.?\d[\d.]*\s*[)\]}}>]"
    rf"|{_NAMED}:[+-]?\d*\.\d+(?=\s*(?:[,;]|$))"
)


@dataclass(frozen=True)
class Weight:
    """A weight that somebody wrote in a prompt: on these words (in small letters), or by an operator (None)."""

    words: str | None
    mark: str


def masked(prompt: str) -> str:
    """The prompt with other characters for escaped brackets and quotation marks; as long as it was."""
    return _ESCAPED.sub(_HIDDEN, prompt)


def with_compel_weights(prompt: str) -> str:
    """The prompt with each weight as Compel reads it: "a/(red cat:1.3)" becomes "a/ (red cat)1.3".

    What Compel reads already stays as it is, and so does what can't be written for it.
    """
    hidden = masked(prompt)
    levels, heavy = [""], [False]  # the text of each open bracket, and whether there is a weight in it
    place = 0
    while place < len(hidden):
        piece = _PIECE.match(hidden, place)
        assert piece is not None  # any character is one
        text, place = prompt[place : piece.end()], piece.end()
        if hidden[piece.start()] == "(":
            levels.append("")
            heavy.append(False)
        elif hidden[piece.start()] == ")" and len(levels) > 1:
            words, weighs = levels.pop(), heavy.pop()
            behind, colon = (
                _WEIGHT.match(hidden, place),
                _COLON_WEIGHT.search(words, max(0, len(words) - _LONGEST_NUMBER)),
            )
            mark = ""
            if behind is not None:
                mark, place = behind.group(), behind.end()
            elif colon is not None:
                words, mark = words[: colon.start()], colon[1].rstrip(".")
            if (mark or weighs) and len(levels) == 1:
                levels[0] = spaced(levels[0])
            levels[-1] += _group(words, mark, outermost=len(levels) == 1)
            heavy[-1] |= bool(mark) or weighs
            stuck = hidden[place : place + 1]
            if mark and (stuck == "." or (behind is None and stuck not in f'{SPACE},)"')):
                levels[-1] += " "  # or the number would go on
        else:
            levels[-1] += text
    return "(".join(levels)


def spaced(text: str) -> str:
    """The text with a space at its end where Compel needs one in front of a group."""
    return text if not text or text[-1] in f"{SPACE}," else f"{text} "


def closed(text: str, behind: str) -> str:
    """A text that ends with a weight, with a space at its end where what stands behind would go on with it."""
    return text if not behind or behind[0] in f"{SPACE}," else f"{text} "


def weighted(words: str, mark: str) -> str:
    """Plain words with a weight, as Compel reads it at the outermost level. A hyphen at a word's end is no sign."""
    return _group(_TRAILING_DASH.sub(" -", words), mark, outermost=True)


def _group(words: str, mark: str, *, outermost: bool) -> str:
    """Between brackets no sign may stand alone, nor an equals sign at all: that one is left out of the brackets."""
    if not mark or not words.strip():
        return f"({words}){mark}"
    words = _LONE_DASH.sub(r"\1", words)  # the same tokens
    if not outermost or "=" not in words or re.search(r"[()\"\\]", words):
        return f"({words}){mark}"
    parts = [part.strip() for part in re.split(r"(=+)", words)]
    return " ".join(part if part[0] == "=" else f"({part}){mark}" for part in parts if part)


def unread_weight(prompt: str) -> bool:
    """Whether there is a weight behind a colon that `with_compel_weights` could not write."""
    return _UNREAD_COLON.search(masked(prompt)) is not None


def left_over(text: str) -> bool:
    """Whether a weight or an operator stands in what Compel took for plain text (of a masked prompt)."""
    return _LEFT_OVER.search(text) is not None


def parts(prompt: str) -> list[tuple[str, bool]]:
    """The prompt in pieces, and whether a piece is free: in no brackets or quotes, and no weight behind them."""
    found: list[tuple[str, bool]] = []
    hidden = masked(prompt)
    start, depth, quoted, place = 0, 0, False, 0
    while place < len(hidden):
        character = hidden[place]
        free = depth == 0 and not quoted
        if character == '"':
            quoted = not quoted
        elif character in "()" and not quoted:
            depth = max(0, depth + (1 if character == "(" else -1))
        place += 1
        if free != (depth == 0 and not quoted):
            end = place - 1
            if not free:
                behind = _WEIGHT.match(hidden, place)
                end = place = place if behind is None else behind.end()
            found.append((prompt[start:end], free))
            start = end
    return [*found, (prompt[start:], depth == 0 and not quoted)]


# --- what somebody weighted, and what became of it --------------------------------------------------------------


def weights_in(prompt: str) -> Counter[Weight]:
    """The weights in a prompt, in whichever notation. Groups in groups are one, with all their words."""
    hidden = masked(with_compel_weights(prompt))
    found = Counter(Weight(None, "".join(match.group().split())) for match in OPERATOR.finditer(hidden))
    rest = _QUOTED.sub(lambda match: _note(found, match[1], match[2]), hidden)
    opened: list[int] = []
    groups: list[tuple[int, int, str]] = []
    for place, character in enumerate(rest):
        if character == "(":
            opened.append(place)
        elif character == ")" and opened:
            start = opened.pop()
            behind = _WEIGHT.match(rest, place + 1)
            if behind is not None:
                groups = [group for group in groups if group[0] < start]  # those in it
                groups.append((start, behind.end(), behind.group()))
    for start, end, mark in reversed(groups):
        _note(found, rest[start + 1 : end - len(mark) - 1], mark)
        rest = f"{rest[:start]} {rest[end:]}"
    for match in _SIGNED.finditer(rest):
        _note(found, match[1], match[2])
    return found


def lost_weights(prompt: str, text: str) -> list[Weight]:
    """The weights in the prompt that are not in the other text."""
    return list((weights_in(prompt) - weights_in(text)).elements())


def with_weights_of(prompt: str, text: str) -> str:
    """The text with the weights of the prompt that it lost, put back on the same words where they stand free in it."""
    for weight in sorted(lost_weights(prompt, text), key=lambda lost: -len(lost.words or "")):
        if weight.words is not None:
            text = _put(weight.words, weight.mark, text)
    return text


def _put(words: str, mark: str, text: str) -> str:
    spread = r"\s+".join(map(re.escape, words.split()))
    pattern = re.compile(rf"(?i)(?<![\w+-]){spread}(?![\w+-])")
    before = ""
    for piece, free in parts(text):
        match = pattern.search(piece) if free else None
        if match is not None:
            behind = text[len(before) + match.end() :]
            return closed(f"{spaced(before + piece[: match.start()])}{weighted(match.group(), mark)}", behind) + behind
        before += piece
    return text


def _note(found: Counter[Weight], words: str, mark: str) -> str:
    plain = re.sub(rf"(?<=\))(?:{_NUMBER}|[+-]+)|[()\"]", "", words)
    number = f"{float(mark):g}" if mark[0] not in "+-" else mark
    if number != "1":
        found[Weight(" ".join(plain.casefold().split()), number)] += 1
    return " "
