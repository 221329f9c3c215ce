from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from sage_retrieval.splitting import MAX_CHARS, MIN_CHARS, slug, split
from sage_retrieval.tokens import passage_terms, question_terms

FILLER = "Words that fill a paragraph so that it is long enough to stand alone. " * 4


def test_headings_become_passages_with_a_link() -> None:
    text = f"# Guide\n\n{FILLER}\n\n## `sage chat`\n\n{FILLER}\n\n## 显存不足 (OOM)\n\n{FILLER}"
    pieces = split("docs/cli.md", text)
    assert [piece.source for piece in pieces] == [
        "docs/cli.md#guide",
        "docs/cli.md#sage-chat",
        "docs/cli.md#显存不足-oom",
    ]
    assert pieces[1].title == "Guide › `sage chat`"


def test_a_bare_title_joins_the_section_below_it() -> None:
    (piece,) = split("a.md", f"# Title\n\n## Section\n\n{FILLER}")
    assert piece.source == "a.md#section" and piece.text.startswith("# Title")


def test_hash_signs_inside_fences_are_no_headings() -> None:
    text = f"# Real\n\n{FILLER}\n\n```bash\n# not a heading\n```\n{FILLER}"
    assert {piece.source for piece in split("a.md", text)} == {"a.md#real"}


@given(st.text(st.sampled_from("#####  \t\u3000aé"), max_size=14))
def test_a_heading_is_its_line_without_blanks_and_closing_hashes(line: str) -> None:
    found = re.match(r"^(#{1,6})\s+(.+?)\s*#*\s*$", line)
    (piece,) = split("a.md", f"x\n{line}\n{FILLER}")
    assert piece.title == (found[2] if found else "")


def test_a_heading_of_a_million_blanks_or_hashes_is_split_like_any_other() -> None:
    for many in (" " * 1_000_000, "#" * 1_000_000, "# " * 500_000):
        assert split("a.md", f"# a{many}x")[0].title == f"a{many}"[:MAX_CHARS]


def test_passages_do_not_repeat_a_heading_without_end() -> None:
    pieces = split("a.md", f"# {'a' * 100_000}\n\n" + f"## {'b' * 1000}\n\n{FILLER}\n\n" * 100)
    assert max(len(piece.title) for piece in pieces) == MAX_CHARS


def test_rst_and_code_have_their_own_headings() -> None:
    rst = f"Install\n=======\n\n{FILLER}\n\nUse\n---\n\n{FILLER}"
    assert [piece.source for piece in split("a.rst", rst)] == ["a.rst#install", "a.rst#use"]
    body = '    """' + FILLER + '"""\n'
    code = f"import os\n\n\ndef first():\n{body}\n\nclass Second:\n{body}"
    assert [piece.source for piece in split("a.py", code)] == ["a.py#first", "a.py#second"]


def test_a_long_section_is_cut_and_every_part_keeps_the_link() -> None:
    pieces = split("a.md", "# Long\n\n" + "\n\n".join([FILLER] * 20))
    assert len(pieces) > 3 and {piece.source for piece in pieces} == {"a.md#long"}
    assert all(MIN_CHARS <= len(piece.text) <= MAX_CHARS for piece in pieces)


@given(st.text(st.sampled_from("ab #\n`世。."), max_size=6000))
def test_no_passage_is_too_long_and_no_letter_is_lost(text: str) -> None:
    for path in ("a.md", "a.py", "a.rst"):
        pieces = split(path, text)
        assert all(0 < len(piece.text) <= MAX_CHARS for piece in pieces)
        kept = "".join("".join(piece.text.split()) for piece in pieces)
        assert kept == "".join(text.split())


def test_slugs_are_those_of_rendered_pages() -> None:
    assert slug("Answers with sources: --index") == "answers-with-sources-index"
    assert slug("`rtx_3060()`") == "rtx-3060"


def test_terms_of_identifiers_plurals_and_chinese() -> None:
    assert passage_terms("The presets: RTX_3060!") == ["preset", "rtx_3060", "rtx", "3060"]
    assert passage_terms("显存不足 OOM 存") == ["显存", "存不", "不足", "oom", "存", "显", "足"]
    assert passage_terms("what is the 什么") == []


def test_signs_of_a_question_count_alone_where_no_pair_is_known() -> None:
    known = {"显存", "存", "显", "养", "猫", "注意", "注", "preset"}
    assert question_terms("显存，存？", known) == ["显存", "存"]
    assert question_terms("显存的预设 presets presets", known) == ["显存", "preset"]
    assert question_terms("养猫要注意什么", known) == ["注意", "养", "猫"]
