"""Text into index terms: words for alphabets, pairs of signs for Han, kana and hangul. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterator

_HAN = "㐀-䶿一-鿿豈-﫿"
_CJK = f"{_HAN}぀-ヿ가-힯"
_RUN = re.compile(rf"[{_CJK}]+|[^\W{_CJK}]+")
_IS_CJK = re.compile(rf"[{_CJK}]")
_IS_HAN = re.compile(rf"[{_HAN}]")
_STOP_WORDS = """
a an and are as at be but by can could did do does for from had has have he her his how i if in into is it
its me my no not of on or our she should so than that the their them then there these they this to up us was
we were what when where which who whom why will with would you your am been any all about tell please exist
more else
什么 怎么 怎样 如何 哪些 哪个 是什 可以 请问 我们 你们
一个 这个 那个 没有 为什 的是 有哪
"""
_STOP_SIGNS = (
    "的了着过是在有我你他她它您们这那哪谁什么怎样何几多少个些为以把被让从到对向跟和与或及也都就还很再又才只"
    "要想会能可该应不没无吗呢吧啊呀嘛而且但如果因所之其于等里上下中时候说请问一"
)
"""Han signs that say nothing on their own."""
_STOP = frozenset([*_STOP_WORDS.split(), *_STOP_SIGNS])


def passage_terms(text: str) -> list[str]:
    """What a passage is found by. Identifiers count whole and in parts: rtx_3060 → rtx_3060, rtx, 3060.

    Han signs count alone besides, since many words are one sign; once each, so that passages of Chinese
    do not count as longer, and so as less about each of their terms, than they are.
    """
    found: list[str] = []
    signs: dict[str, None] = {}
    for run in _runs(text):
        if _IS_CJK.match(run):
            found.extend(pair for pair in _pairs(run) if pair not in _STOP)
            signs.update(dict.fromkeys(_IS_HAN.findall(run)))
        else:
            found.extend(_words(run))
    elsewhere = _STOP.union(found)
    return [*found, *(sign for sign in signs if sign not in elsewhere)]


def question_terms(question: str, known: Container[str]) -> list[str]:
    """Which of the known terms to look for, each once.

    A Han sign alone is looked for where it is in no pair that is known: of 养猫, unknown, the cat counts.
    """
    found: dict[str, None] = {}
    for run in _runs(question):
        if not _IS_CJK.match(run):
            found.update(dict.fromkeys(_words(run)))
            continue
        is_paired = [False] * len(run)
        for start, pair in enumerate(_pairs(run)):
            if pair in _STOP or pair in known:
                is_paired[start : start + len(pair)] = [True] * len(pair)
                found[pair] = None
        found.update((sign, None) for sign, paired in zip(run, is_paired, strict=True) if not paired)
    return [term for term in found if term not in _STOP and term in known]


def says_something(question: str) -> bool:
    """Whether it has a word that says something on its own, as "And why is that?" has none."""
    return any(
        not _STOP.issuperset(run) if _IS_CJK.match(run) else run not in _STOP for run in _runs(question)
    )


def _runs(text: str) -> Iterator[str]:
    """Words, and runs of Han, kana and hangul; the same ones whichever way accents and widths are encoded."""
    yield from _RUN.findall(unicodedata.normalize("NFKC", text).lower())


def _pairs(run: str) -> list[str]:
    return [run[start : start + 2] for start in range(len(run) - 1)] or [run]


def _words(run: str) -> Iterator[str]:
    if run in _STOP:
        return
    yield _singular(run)
    if "_" in run:
        yield from (_singular(part) for part in run.split("_") if part and part not in _STOP)


def _singular(word: str) -> str:
    # Enough of English to let "presets" find "preset"; applied to both sides, so it need not be right.
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
