"""How likely a text is, in bits: what tells which of several encodings a file is in.

Why not charset-normalizer: where few characters are beyond ASCII, as a degree sign here and there, it takes
Western text for Korean or Japanese, and a third of the short tables in other encodings than UTF-8 for others.

The numbers are rough on purpose: a wrong encoding turns the frequent characters of a language into rare ones
of another, and letters into signs, which costs several times as much as the right one.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from math import log2

from sage.tools.finetune.data.common_characters import HANGUL, KANJI, SIMPLIFIED, TRADITIONAL
from sage.tools.finetune.data.languages import LANGUAGES, missing_words

ASCII_BITS = 4.0
_KNOWN_WIDE, _RARE_WIDE = 15.0, 20.0
_NEVER = 40.0
"""Of what no text has: control characters, and bytes that stand for nothing."""

_FIRST_LETTER, _NEXT_LETTER, _LAST_LETTER = 3.5, 0.4, 8.0
"""Of a language's most frequent letter beyond ASCII, by how much the next is rarer at most, of the last."""
_FOREIGN_LETTER, _OTHER_LANGUAGE, _MISSING_WORD = 14.0, 5.0, 2.0

_LETTERS = frozenset("éèêëàâäáãåçîïíìôöóòõøúùûüñßæœýÿ")
_WORDS = frozenset("àáèéíòóúùåöаивкосуяю")
"""Letters that are words of their own."""
_SIGNS = frozenset("’‘“”‚„–—…°£€§«»·¿¡©®™±µ²³½ºª¼¾×÷•\xa0")
_JOINING = frozenset("’–—…·")
"""Signs that stand between two letters."""
# Those that stand before and behind a letter without a blank.
_BEFORE_LETTERS = frozenset("‘’“”‚„«»–—…·§©µ¿¡•°\xa0")
_BEHIND_LETTERS = frozenset("‘’“”«»–—…·®™°ºª²³\xa0")
_PAIRS = {"„": "“”", "‚": "‘’", "“": "”„", "«": "»", "»": "«"}
_UNPAIRED_SIGN = 8.0
_OPENING = frozenset("‚„¿¡")
_NEIGHBOURLY = frozenset("“”‘’«»…–—\xa0·°€£")
"""Signs that stand beside others."""
_RARE_WIDE_SIGNS = frozenset("〈〉〔〕")
_WIDE_SIGNS = frozenset("　、。，．・：；？！（）「」『』《》〈〉【】〔〕ー～〜％＋－＝／“”‘’…—·￥")
_WIDE_SCRIPTS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL"})


def _by_rank(characters: str) -> dict[str, float]:
    """The bits of each, as frequencies fall in every language: steeply first, then ever more slowly."""
    return {char: 4.6 + 0.75 * log2(rank) for rank, char in enumerate(characters, 1)}


_CHINESE = _by_rank(TRADITIONAL) | _by_rank(SIMPLIFIED)
_JAPANESE, _KOREAN = _by_rank(KANJI), _by_rank(HANGUL)
_OFTEN = {
    "gb18030": _CHINESE,
    "big5": _CHINESE,
    "cp932": _JAPANESE,
    "euc-jp": _JAPANESE,
    "cp949": _KOREAN,
}
_FIRST_LEVEL = {
    "gb18030": (0xB0, 0xD7, 0xA1),
    "big5": (0xA4, 0xC6, 0x40),
    "cp932": (0x88, 0x97, 0x40),
    "euc-jp": (0xB0, 0xCF, 0xA1),
    "cp949": (0xB0, 0xC8, 0xA1),
}
"""Where the standards keep what is in daily use: the first and the last first byte, the least second one."""


def bits_of(text: str, encoding: str, plain: frozenset[str] = frozenset()) -> float:
    """What the text costs as one that people write in this encoding, beside these `plain` words of ASCII.

    ASCII costs a little, as it is swallowed by encodings of two bytes.
    """
    if encoding in LANGUAGES:
        return _bits_in_languages(text, encoding, plain)
    padded = f" {text} "
    return sum(
        ASCII_BITS if char < "\x80" else _bits(before, char, after, encoding)
        for before, char, after in zip(padded, text, padded[2:], strict=False)
    )


def _bits_in_languages(text: str, encoding: str, plain: frozenset[str]) -> float:
    """Of its words, most of which are of one language; every other costs something for being of another."""
    languages, missing = LANGUAGES[encoding][1], missing_words(plain)
    alphabets = [_alphabet(language.letters) for language in languages]
    totals = [_MISSING_WORD * missing[language] for language in languages]
    for word in text.split(" "):
        frame, letters = _taken_apart(word)
        costs = [
            frame + sum([alphabet.get(char, _FOREIGN_LETTER) for char in letters]) for alphabet in alphabets
        ]
        most = min(costs) + _OTHER_LANGUAGE
        totals = [total + min(cost, most) for total, cost in zip(totals, costs, strict=True)]
    return min(totals) + sum(
        _UNPAIRED_SIGN for one, others in _PAIRS.items() if one in text and not set(others).intersection(text)
    )


@lru_cache
def _alphabet(letters: str) -> dict[str, float]:
    step = min(_NEXT_LETTER, (_LAST_LETTER - _FIRST_LETTER) / len(letters))
    return {char: _FIRST_LETTER + step * rank for rank, char in enumerate(letters)}


@lru_cache(1 << 14)
def _taken_apart(word: str) -> tuple[float, str]:
    """What it costs in any language, and its letters beyond ASCII."""
    bits, letters = 0.0, []
    padded = f" {word} "
    for before, char, after in zip(padded, word, padded[2:], strict=False):
        if char < "\x80":
            bits += ASCII_BITS
        elif char == "\ufffd" or unicodedata.category(char) in ("Cc", "Co", "Cn"):
            bits += _NEVER
        elif unicodedata.category(char) == "Mn":
            letters.append(char)
            bits += 0 if _stands_on(before, char) else 12
        elif _script(char):
            letters.append(char if char == "İ" else char.lower())
            bits += _beside(before, char, after)
        else:
            bits += _sign(before, char, after)
    return bits, "".join(letters)


def _stands_on(before: str, mark: str) -> bool:
    """Whether a mark above or below a letter is on one of its own alphabet."""
    alphabet = unicodedata.name(mark).partition(" ")[0]
    return (before.isalpha() and alphabet == "COMBINING") or unicodedata.name(before, "").startswith(alphabet)


def _beside(before: str, char: str, after: str) -> float:
    """What a letter costs beside these, whatever its language."""
    script, around = _script(char), (_script(before), _script(after))
    bits = 0.0
    if char.isupper():
        bits += (8 if after.islower() else 2) if before.isupper() else 12 if before.islower() else 3
    if script not in around:
        bits += 2 if char in _WORDS else 8
    if {*around} - {"", script}:
        bits += 8
    if script == "LATIN":
        bits += (0, 1, 7)[sum(near >= "\x80" and near.isalpha() for near in (before, after))]
    return bits


@lru_cache(1 << 14)
def _bits(before: str, char: str, after: str, encoding: str) -> float:
    script = _script(char)
    around = (_script(before), _script(after))
    if char == "\ufffd" or unicodedata.category(char) in ("Cc", "Co", "Cn"):
        return _NEVER
    if script == "HALFWIDTH":
        return (20.0, 10.0, 7.0)[around.count("HALFWIDTH")]
    if script in _WIDE_SCRIPTS:
        is_in_word = any(near < "\x80" and near.isalpha() for near in (before, after))
        return _wide(char, script, encoding) + (3 if is_in_word else 0)
    if script and char not in _SIGNS:
        return _letter(before, char, after, encoding)
    if char in _WIDE_SIGNS and encoding in _OFTEN:
        if all(near < "\x80" and near.isalpha() for near in (before, after)):
            return _KNOWN_WIDE
        return 13.0 if char in _RARE_WIDE_SIGNS else 5.0
    return _sign(before, char, after)


def _wide(char: str, script: str, encoding: str) -> float:
    is_japanese = encoding in ("cp932", "euc-jp")
    if script in ("HIRAGANA", "KATAKANA"):
        return 5.0 if is_japanese else _KNOWN_WIDE
    often = _OFTEN.get(encoding, {})
    if char in often:
        return often[char]
    first, last, second = _FIRST_LEVEL.get(encoding, (1, 0, 0))
    written = char.encode(encoding, "replace")
    is_known = len(written) == 2 and first <= written[0] <= last and written[1] >= second
    return _KNOWN_WIDE if is_known else _RARE_WIDE


def _letter(before: str, char: str, after: str, encoding: str) -> float:
    script = _script(char)
    around = (_script(before), _script(after))
    if encoding in _OFTEN and script != "LATIN":
        return _KNOWN_WIDE  # these encodings hold other alphabets for completeness
    is_cyrillic = "А" <= char <= "я" or char in "ёЁ"
    is_frequent = char.lower() in _LETTERS or script == "GREEK" or is_cyrillic
    bits = 4.0 if is_frequent else 13.0 if script == "CYRILLIC" and encoding == "utf-8" else 9.0
    if char.isupper() and not before.isupper():
        bits += 3
    if script not in around:
        bits += _alone(char, script, encoding, is_frequent)
    if {*around} - {"", script}:
        bits += 8
    if char.isupper() and before.islower():
        bits += 12
    if script == "LATIN" and any(near >= "\x80" and near.isalpha() for near in (before, after)):
        bits += 4
    return bits


def _alone(char: str, script: str, encoding: str, is_frequent: bool) -> float:
    """What a letter costs more that has none of its script beside it."""
    if char in _WORDS and encoding != "utf-8":
        return 2.0
    is_at_home = script == "GREEK" or (script == "LATIN" and char <= "ÿ")
    return 8.0 if is_at_home else 10.0 if is_frequent else 15.0


def _sign(before: str, char: str, after: str) -> float:
    bits = 6.0 if char in _SIGNS else 11.0
    if _script(before) and ((_script(after) and char not in _JOINING) or char in _OPENING):
        bits += 8
    if (_script(before) and char not in _BEHIND_LETTERS) or (_script(after) and char not in _BEFORE_LETTERS):
        bits += 6
    if _script(before) and char in "–—…":
        bits += 3 if _script(after) else 2
    if any(near >= "\x80" and not _script(near) and near not in _NEIGHBOURLY for near in (before, after)):
        bits += 3
    return bits


@lru_cache(1 << 14)
def _script(char: str) -> str:
    """The first word of a letter's name, such as LATIN; empty for what is no letter."""
    if char in _SIGNS:
        return ""
    return unicodedata.name(char, "").partition(" ")[0] if char.isalpha() else ""
