"""Whether a language model's answer can be used as a prompt, judged from the text alone.

`unusable` looks for what an answer must not be: empty, a refusal, talk instead of a prompt, its own
instructions, noise, or something about another subject. Its thresholds are loose on purpose: what it is for is an
answer that is plainly wrong, in any script; it measures no quality.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Final

_LABEL: Final = re.compile(
    r"(?i)^(?:(?:sure|certainly|of course)[^\n:]{0,60}:|(?:here(?:'s| is)[^\n:]{0,60}:)"
    r"|(?:enhanced|rewritten|improved|final|new)?\s*prompt\s*:)\s*"
)
_THOUGHTS: Final = re.compile(r"(?s)^\s*<think>.*?</think>")
_QUOTES: Final = {'"': '"', "“": "”", "«": "»", "`": "`", "「": "」", "'": "'"}


def cleaned(answer: str) -> str:
    """The answer without what frames a prompt: a label before it, quotation marks or a code fence around it.

    Only the frame goes. Nothing inside the text is removed, refusals least of all.
    """
    text = _THOUGHTS.sub("", answer).strip()
    text = re.sub(r"(?s)^```\w*\s*(.*?)\s*```$", r"\1", text)
    text = _LABEL.sub("", text.strip("*").strip(), count=1).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return " ".join(text.split())


def unusable(answer: str, prompt: str, instructions: str = "") -> str | None:
    """Why the (cleaned) answer can't stand for the prompt, or None if it can.

    Reasons: empty_answer, gibberish, refusal, not_a_prompt (talk, markup or code), echo (of the instructions),
    unchanged, unrelated (an English prompt of several words, of which the answer has not one).
    """
    if not answer.strip():
        return "empty_answer"
    # Refusals first: an odd-looking refusal is still one.
    if _says(_REFUSALS, answer, prompt):
        return "refusal"
    if _is_gibberish(answer, prompt):
        return "gibberish"
    if instructions and _repeats(answer, instructions, prompt):
        return "echo"
    if _says(_TALK, answer, prompt):
        return "not_a_prompt"
    if _words(answer) == _words(prompt):
        return "unchanged"
    if _is_unrelated(answer, prompt):
        return "unrelated"
    return None


# --- refusals and talk ----------------------------------------------------------------------------------


def _any_of(*signs: str) -> re.Pattern[str]:
    return re.compile("|".join(signs), re.IGNORECASE)


_REFUSALS: Final = _any_of(
    r"\bi(?:['’]?m| am) (?:very |so |really )?(?:sorry|unable|not able|afraid)\b",
    r"\b(?:i|we) (?:can(?:not|['’]?t| not)|could ?n[o'’]t|won['’]?t|will not|must decline|decline|refuse)\b",
    r"\bi apologi[sz]e\b|\b(?:sorry|apologies),? (?:but|i)\b",
    r"\bas an? (?:ai|(?:large )?language model)\b",
    r"\b(?:unable|not (?:able|allowed)) to (?:assist|help|comply|fulfil|create|generate)",
    r"\b(?:this|the|your) request (?:can['’]?t|cannot|violates)",
    r"\b(?:against|violates?) (?:my|our|the) (?:guidelines|polic(?:y|ies)|principles)",
    r"\blo siento\b|\bno puedo (?:ayudar|crear|generar|cumplir)",
    r"\bes tut mir leid\b|\bich kann (?:diese|dabei|das|ihnen)[^.]{0,60}nicht",
    r"\bje suis désolée?\b|\bje ne peux pas\b",
    r"\bsinto muito\b|\bdesculpe\b|\bnão posso (?:ajudar|criar|gerar)",
    r"\bmi dispiace\b|\bnon posso (?:aiutar|crear|gener)",
    r"\bизвините\b|\bк сожалению\b|\bя не могу\b",
    r"申し訳|お手伝いできません|できかねます",
    r"我无法|我不能|抱歉|無法協助|죄송",
)
_TALK: Final = _any_of(
    r"\b(?:could|would|can) you (?:please|like|provide|clarify|tell|give)\b",
    r"\bplease (?:provide|clarify|let me know|specify)\b|\blet me know\b",
    r"\bhow can i (?:help|assist)\b|\bas (?:you )?requested\b",
    r"\bi(?:['’]ll| will| have| can) (?:rewrite|write|enhance|create|help)\b",
    r"\b(?:enhanced|system) prompt\b",
    r"<\|?\w+\|?>|```|\bdef \w+\(|\bfunction ?\(|\breturn \w+;|https?://|\{\s*[\"']",
)


def _says(signs: re.Pattern[str], answer: str, prompt: str) -> bool:
    """Whether the answer shows such a sign that is not in the prompt already (a sign may quote anything)."""
    quoted = prompt.casefold()
    return any(match.group().casefold() not in quoted for match in signs.finditer(answer))


def _repeats(answer: str, instructions: str, prompt: str) -> bool:
    """Whether eight words of the instructions stand in the answer in their order, unless the prompt says them."""
    told, own = " ".join(_words(instructions)), " ".join(_words(prompt))
    words = _words(answer)
    runs = (" ".join(words[start : start + 8]) for start in range(len(words) - 7))
    return any(run in told and run not in own for run in runs)


# --- noise ----------------------------------------------------------------------------------------------


def _is_gibberish(answer: str, prompt: str) -> bool:
    visible = [character for character in answer if not character.isspace()]
    noise = sum(_is_noise(character) for character in visible) + answer.count("\x00")
    if noise > len(visible) * 0.01:
        return True
    letters = sum(unicodedata.category(character)[0] in "LM" for character in visible)
    if letters < len(visible) * 0.6 and letters < len(visible) * 0.8 * _letter_share(prompt):
        return True
    if re.search(r"(.)\1{5,}", answer) or re.search(r"(.{2,12}?)\1{4,}", answer):
        return True
    return _has_strange_words(answer, prompt) or _mixes_scripts(answer, prompt) or _goes_round(answer)


def _is_noise(character: str) -> bool:
    joins_or_marks_direction = character in "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"
    unprintable = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co")
    return character == "\ufffd" or (unprintable and not joins_or_marks_direction)


def _letter_share(text: str) -> float:
    visible = [character for character in text if not character.isspace()]
    return sum(character.isalpha() for character in visible) / max(len(visible), 1)


def _has_strange_words(answer: str, prompt: str) -> bool:
    """Whether many Latin words are built as no word is; words of the prompt may look as they like."""
    known = set(_words(prompt))
    words = [word for word in re.findall(r"[^\s,;:.!?()\[\]\"“”/–—|+*-]+", answer) if word.casefold() not in known]
    latin = [word for word in words if re.search(r"[A-Za-zÀ-ɏ]", word)]
    if not latin:
        return False
    letters = "".join(latin).casefold()
    strange = [word for word in latin if not _is_wordlike(word)]
    # Words count by their letters: noise is long, and anything of one or two letters may be a word.
    share = sum(map(len, strange)) / len(letters)
    rare = sum(letters.count(letter) for letter in "jkqvwxz") / len(letters)
    return share > 0.5 or (share > 0.3 and len(strange) > 1) or (rare > 0.2 and len(letters) >= 30)


_UNIT_OR_TERM: Final = re.compile(
    r"\d+(?:x\d+)?[a-z]{0,4}|[a-z]{1,3}\d+[a-z]?|[a-z]/?\d+(?:\.\d+)?|[A-Z]{2,6}\d*|[a-z]{1,2}"
)
_VOWELS: Final = frozenset("aeiouyæøœıw")
_CONSONANTS: Final = re.compile(r"[bcdfghjklmnpqrstvxz]{6,}")
# Pairs of letters that words in European languages hardly have; random letters have one in every second word.
_UNHEARD: Final = re.compile(
    r"q[b-df-hj-np-tv-z]|[bfghjklmptvwxz]q|x[bdgjkrvz]|[bcdfghjkmpqstvwz]x|j[bcfghpqrvwxz]|[cqwxz]j"
    r"|v[bcfghjmpqtwx]|z[cfgjpqrx]|[bfghjpqvx]z|w[bfgjqvx]|[cfgjmpqx]v|[cfjmpqvxz]w"
)


def _is_wordlike(word: str) -> bool:
    """Whether a word looks like one: has a vowel, no long run of consonants, no capitals or digits inside."""
    if _UNIT_OR_TERM.fullmatch(word) or _UNIT_OR_TERM.fullmatch(word.casefold()):
        return True
    parts = [part for part in re.split(r"['’`&_]", word) if part]
    return bool(parts) and all(_is_word_part(part) for part in parts)


def _is_word_part(part: str) -> bool:
    plain = "".join(c for c in unicodedata.normalize("NFKD", part.casefold()) if not unicodedata.combining(c))
    if not plain.isalpha() or len(plain) > 32:
        return False
    natural_case = (
        part.islower() or part.isupper() or part[1:].islower() or re.fullmatch(r"(?:Mc|Mac|De|La|O)?[A-Z]\w+", part)
    )
    if not natural_case or (len(plain) > 2 and not _VOWELS & set(plain)):
        return False
    return not (_CONSONANTS.search(plain) or _UNHEARD.search(plain)) and len(set(plain)) > 1 + (len(plain) > 6)


_SCRIPTS: Final = (
    ("LATIN", "latin"), ("CYRILLIC", "cyrillic"), ("GREEK", "greek"), ("CJK", "han"), ("HIRAGANA", "han"),
    ("KATAKANA", "han"), ("HANGUL", "hangul"), ("ARABIC", "arabic"), ("HEBREW", "hebrew"), ("THAI", "thai"),
    ("DEVANAGARI", "devanagari"),
)  # fmt: skip


def _scripts(text: str) -> set[str]:
    found: Counter[str] = Counter()
    for character in text:
        if character.isalpha():
            name = unicodedata.name(character, "")
            found[next((script for start, script in _SCRIPTS if name.startswith(start)), "other")] += 1
    return {script for script, count in found.items() if count > 1}


def _mixes_scripts(answer: str, prompt: str) -> bool:
    """Whether more than one script came in that the prompt does not use, beside Latin."""
    return len(_scripts(answer) - _scripts(prompt) - {"latin"}) > 1


def _goes_round(answer: str) -> bool:
    """Whether an answer of some length says the same few words again and again."""
    words = _words(answer)
    return len(words) >= 12 and len(set(words)) < len(words) * 0.34


# --- the subject ----------------------------------------------------------------------------------------

_ENGLISH: Final = frozenset(
    ("a", "an", "the", "of", "in", "on", "at", "with", "and", "to", "from", "by", "for", "is", "are", "under", "over")
)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _is_unrelated(answer: str, prompt: str) -> bool:
    words = _words(prompt)
    if not _ENGLISH & set(words):
        return False
    subject = {word[:4] for word in words if len(word) > 2 and word not in _ENGLISH}
    return len(subject) >= 3 and not subject & {word[:4] for word in _words(answer)}
