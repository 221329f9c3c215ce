"""The data that the task `code` brings: this Python's own standard library, all of it."""

from __future__ import annotations

from sage.tools.finetune.code_data import build_code_pairs, split_by_module


def test_the_standard_library_has_plenty() -> None:
    pairs = build_code_pairs(None)
    assert len(pairs) > 1500
    assert len({pair.answer for pair in pairs}) == len(pairs)
    train, held = split_by_module(pairs, 0.1)
    assert 0.05 < len(held) / len(pairs) < 0.2
    assert {pair.module for pair in train}.isdisjoint(pair.module for pair in held)
