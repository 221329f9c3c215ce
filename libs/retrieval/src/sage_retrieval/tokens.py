"""Text into index terms: words for alphabets, character pairs for Han, kana and hangul. Pure."""

from __future__ import annotations

import re

_CJK = "぀-ヿ㐀-䶿一-鿿豈-﫿가-힯"
_RUN = re.compile(rf"[{_CJK}]+|[^\W{_CJK}]+")
_IS_CJK = re.compile(rf"[{_CJK}]")
_STOP_WORDS = """
a an and are as at be but by can could did do does for from had has have he her his how i if in into is it
its me my no not of on or our she should so than that the their them then there these they this to up us was
we were what when where which who whom why will with would you your am been any all about tell please exist
什么 怎么 怎样 如何 哪些 哪个 是什 可以 请问 我们 你们
一个 这个 那个 没有 为什 的是 有哪
"""
_STOP = frozenset(_STOP_WORDS.split())


def terms(text: str) -> list[str]:
    """The terms of a text, in order. Identifiers count whole and in parts: rtx_3060 → rtx_3060, rtx, 3060."""
    found: list[str] = []
    for run in _RUN.findall(text.lower()):
        if _IS_CJK.match(run):
            pairs = [run[start : start + 2] for start in range(len(run) - 1)] or [run]
            found.extend(pair for pair in pairs if pair not in _STOP)
        elif run not in _STOP:
            found.append(_singular(run))
            if "_" in run:
                found.extend(_singular(part) for part in run.split("_") if part and part not in _STOP)
    return found


def _singular(word: str) -> str:
    # Enough of English to let "presets" find "preset"; applied to both sides, so it need not be right.
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
