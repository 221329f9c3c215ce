from __future__ import annotations

import os
import shutil
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from sage_contracts.errors import ConflictError, InvalidRequestError, NotFoundError
from sage_contracts.indexes import IndexDocument
from sage_retrieval.build import DOCUMENTS, build
from sage_retrieval.store import DOCS_INDEX, IndexStore

FILLER = "It is explained here at some length, so that the passage may stand alone in the index. " * 3


MEMORY = [
    IndexDocument(
        path="memory.md",
        text=f"# Memory\n\n## Out of memory\n\nQuantisation. Shared. {FILLER}\n\n## Gradients\n\n{FILLER}",
    ),
    IndexDocument(
        path="zh/memory.md", text="# 显存\n\n## 显存不足\n\n请启用量化，并减小批量大小。" + "说明文字。" * 50
    ),
]
ZEPPELINS = [IndexDocument(path="tuning.md", text=f"# Tuning\n\nUse zeppelins. Shared. {FILLER}")]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "docs" / "zh").mkdir(parents=True)
    (root / "docs" / ".hidden").mkdir()
    (root / "README.md").write_text(f"# Project\n\nQuickstart begins here. {FILLER}")
    (root / "docs" / "memory.md").write_text(
        f"# Memory\n\n## Out of memory\n\nUse quantisation. {FILLER}\n\n## Gradients\n\nCheckpoint. {FILLER}"
    )
    (root / "docs" / "zh" / "memory.md").write_text(
        "# 显存\n\n## 显存不足\n\n请启用量化，并减小批量大小。" + "说明文字。" * 50
    )
    (root / "docs" / ".hidden" / "secret.md").write_text("# Secret\n\nquantisation " * 50)
    (root / "unrelated.md").write_text("# Unrelated\n\nquantisation " * 50)
    return root


@pytest.fixture
def store(tmp_path: Path, docs: Path) -> IndexStore:
    return IndexStore(tmp_path / "indexes", docs)


def test_docs_are_indexed_at_first_use_and_cited(store: IndexStore) -> None:
    assert store.cards() == [] and store.names() == [DOCS_INDEX]
    best, *_ = store.search(DOCS_INDEX, "How do I use quantisation?")
    assert (best.id, best.source) == (1, "docs/memory.md#out-of-memory") and "quantisation" in best.text
    (card,) = store.cards()
    assert card.id == DOCS_INDEX and card.passages == 4


def test_only_readmes_and_docs_count_as_documentation(store: IndexStore) -> None:
    found = store.search(DOCS_INDEX, "quantisation quickstart", limit=20)
    assert {passage.source.split("#")[0] for passage in found} == {"docs/memory.md", "README.md"}


def test_chinese_questions_find_chinese_passages(store: IndexStore) -> None:
    assert store.search(DOCS_INDEX, "显存不足怎么办？")[0].source == "docs/zh/memory.md#显存不足"


CHORES = [
    IndexDocument(path="cat.md", text="家猫需要高蛋白的食物，猫粮要选择正规的品牌。给猫喂食应当定时定量。"),
    IndexDocument(path="dog.md", text="狗需要每天散步两次，注意牵好绳子，天热时多喝水，不要喂巧克力。"),
    IndexDocument(path="tax.md", text="个人所得税应在次年三月至六月申报，增值税按月申报，逾期加收滞纳金。"),
    IndexDocument(path="tea.md", text="绿茶富含茶多酚，用八十度的水冲泡，红茶则用沸水。"),
]


@pytest.mark.parametrize(
    ("question", "source"),
    [
        ("猫", "cat.md"),
        ("猫吃什么？", "cat.md"),
        ("养猫要注意什么", "cat.md"),
        ("狗呢？", "dog.md"),
        ("税怎么交", "tax.md"),
        ("茶", "tea.md"),
        ("牛呢？", None),
        ("你是什么", None),
    ],
)
def test_chinese_words_of_one_sign_are_found(store: IndexStore, question: str, source: str | None) -> None:
    store.put("zh", CHORES)
    sources = [passage.source for passage in store.search("zh", question)]
    assert source in sources if source else sources == []


def test_copies_of_a_passage_count_once(store: IndexStore) -> None:
    copy = f"Return an item with the receipt. The receipt of the item is needed for a return. {FILLER}"
    policy = f"A receipt is not needed for an item when you have an account. {FILLER}"
    copies = [IndexDocument(path=f"copy{number}/README.md", text=copy) for number in range(6)]
    others = [
        IndexDocument(path=f"{number}.md", text=f"Other matters. {FILLER}{number}") for number in range(20)
    ]
    store.put("mine", [*copies, *others, IndexDocument(path="policy.md", text=policy)])
    found = store.search("mine", "How do I return an item without the receipt?")
    assert [(it.id, it.source) for it in found] == [(1, "copy0/README.md"), (2, "policy.md")]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_encoding_of_accents_and_widths_does_not_matter(
    store: IndexStore, form: Literal["NFC", "NFD"]
) -> None:
    documents = [
        IndexDocument(path="café.md", text=unicodedata.normalize(form, f"Le déjeuner est servi. {FILLER}")),
        IndexDocument(path="card.md", text=f"ＲＴＸ３０９０ の ﾒﾓﾘ. {FILLER}"),
    ]
    store.put("mine", documents)
    for question in ("déjeuner", unicodedata.normalize("NFD", "déjeuner"), "CAFÉ"):
        assert [passage.source for passage in store.search("mine", question)] == ["café.md"]
    for question in ("RTX3090", "ｒｔｘ３０９０", "メモリ"):
        assert [passage.source for passage in store.search("mine", question)] == ["card.md"]


@pytest.mark.parametrize("question", ["What is the weather on Mars?", "", "???", "火星"])
def test_nothing_found_is_an_empty_list(store: IndexStore, question: str) -> None:
    assert store.search(DOCS_INDEX, question) == []


def test_an_index_on_disk_serves_the_next_process(store: IndexStore, docs: Path) -> None:
    expected = store.search(DOCS_INDEX, "checkpoint gradients")
    again = IndexStore(store.folder, docs)
    assert again.search(DOCS_INDEX, "checkpoint gradients") == expected
    assert again.cards() == store.cards()


def test_changed_documentation_is_read_again_by_the_next_process(store: IndexStore, docs: Path) -> None:
    store.search(DOCS_INDEX, "quantisation")
    before = store.cards()[0].generation
    page = docs / "docs" / "memory.md"
    page.write_text(f"# Memory\n\n## Tuning\n\nUse zeppelins. {FILLER}")
    os.utime(page, ns=(1, 1))
    again = IndexStore(store.folder, docs)
    assert again.search(DOCS_INDEX, "zeppelin")[0].source == "docs/memory.md#tuning"
    assert again.cards()[0].generation != before
    assert [path.name for path in (store.folder / DOCS_INDEX).glob("g-*")] == [again.cards()[0].generation]


def test_users_add_their_own_documents(store: IndexStore) -> None:
    card = store.put("mine", MEMORY)
    assert (card.files, card.passages, card.source) == (2, 3, "") and store.names() == [DOCS_INDEX, "mine"]
    assert store.search("mine", "quantisation")[0].source == "memory.md#out-of-memory"
    assert store.search("mine", "显存不足怎么办？")[0].source == "zh/memory.md#显存不足"
    assert IndexStore(store.folder).search("mine", "quantisation") == store.search("mine", "quantisation")


def test_documents_take_the_place_of_those_that_were_there(store: IndexStore) -> None:
    store.put("mine", MEMORY)
    store.search("mine", "quantisation")
    store.put("mine", ZEPPELINS)
    assert store.search("mine", "quantisation") == []
    assert store.search("mine", "zeppelin")[0].source == "tuning.md#tuning"
    assert {path.name for path in (store.folder / "mine").iterdir()} == {
        "index.json",
        store.cards()[0].generation,
    }
    assert [path.name for path in store.folder.iterdir()] == ["mine"]


def test_searches_are_answered_while_an_index_is_replaced(store: IndexStore) -> None:
    store.put("mine", MEMORY)
    expected = store.search("mine", "quantisation")
    seen = []

    class Asking(list[IndexDocument]):
        """Asks the index, as another request would, whenever the build looks at its documents."""

        def __iter__(self) -> Iterator[IndexDocument]:
            seen.append(elsewhere.submit(store.search, "mine", "quantisation").result(timeout=30))
            return super().__iter__()

    with ThreadPoolExecutor(1) as elsewhere:
        store.put("mine", Asking(ZEPPELINS))
    assert seen and all(found == expected for found in seen)
    assert store.search("mine", "quantisation") == [] and store.search("mine", "zeppelin")


def test_a_failed_replacement_leaves_the_old_index(store: IndexStore) -> None:
    expected = (store.put("mine", MEMORY), store.search("mine", "quantisation"))
    with pytest.raises(InvalidRequestError, match="no text to index"):
        store.put("mine", [IndexDocument(path="empty.md", text=" \n")])
    assert (store.cards()[0], store.search("mine", "quantisation")) == expected


def test_a_removed_index_is_gone(store: IndexStore) -> None:
    store.put("mine", MEMORY)
    store.remove("mine")
    assert store.names() == [DOCS_INDEX] and list(store.folder.iterdir()) == []
    with pytest.raises(NotFoundError, match="no index 'mine'"):
        store.search("mine", "quantisation")
    with pytest.raises(NotFoundError, match="no index 'mine'"):
        store.remove("mine")


def test_an_index_without_its_manifest_can_be_removed(store: IndexStore) -> None:
    store.put("mine", MEMORY)
    (store.folder / "mine" / "index.json").write_text("{")
    store.remove("mine")
    assert list(store.folder.iterdir()) == []


def test_an_unknown_index_lists_the_right_names(store: IndexStore) -> None:
    store.put("mine", MEMORY)
    with pytest.raises(NotFoundError, match=r"no index 'docs'.*docs-public, mine"):
        store.search("docs", "anything")
    with pytest.raises(NotFoundError):
        store.search("../../etc", "anything")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "-x", "mine\n", "a b", "x" * 65, "名"])
def test_what_is_no_name_is_refused_and_leaves_nothing(store: IndexStore, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="no name"):
        store.put(name, MEMORY)
    with pytest.raises(InvalidRequestError, match="no name"):
        store.remove(name)
    assert not store.folder.exists()


def test_the_projects_documentation_is_protected(store: IndexStore) -> None:
    expected = store.search(DOCS_INDEX, "quantisation")
    with pytest.raises(ConflictError, match="the project's own documentation"):
        store.put(DOCS_INDEX, ZEPPELINS)
    with pytest.raises(ConflictError, match="the project's own documentation"):
        store.remove(DOCS_INDEX)
    assert store.search(DOCS_INDEX, "quantisation") == expected


def test_what_a_killed_process_left_is_cleared_away(store: IndexStore) -> None:
    left = store.folder / ".incoming" / "bm25"
    left.mkdir(parents=True)
    assert store.cards() == []
    store.put("mine", MEMORY)
    assert [path.name for path in store.folder.iterdir()] == ["mine"]


def test_a_docs_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="SAGE_DOCS_DIR"):
        IndexStore(tmp_path / "indexes", tmp_path / "absent").search(DOCS_INDEX, "anything")


def test_a_damaged_index_is_built_again(store: IndexStore, docs: Path) -> None:
    store.search(DOCS_INDEX, "quantisation")
    generation = store.folder / DOCS_INDEX / store.cards()[0].generation
    (generation / "passages.jsonl").unlink()
    assert IndexStore(store.folder, docs).search(DOCS_INDEX, "quantisation")


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda whole: whole[: len(whole) // 2], lambda _: bytes(64)]
)
def test_an_index_with_a_damaged_file_is_built_again(
    store: IndexStore, docs: Path, damage: Callable[[bytes], bytes]
) -> None:
    expected = store.search(DOCS_INDEX, "quantisation")
    names = [
        path.relative_to(home)
        for home in (store.folder / DOCS_INDEX).glob("g-*")
        for path in home.rglob("*")
        if path.is_file()
    ]
    assert len(names) > 3
    for name in names:
        generation = store.folder / DOCS_INDEX / store.cards()[0].generation
        (generation / name).write_bytes(damage((generation / name).read_bytes()))
        assert IndexStore(store.folder, docs).search(DOCS_INDEX, "quantisation") == expected, name


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (folder / "index.json").write_text("{")])
def test_documentation_that_is_lost_in_use_is_built_again(
    store: IndexStore, damage: Callable[[Path], object]
) -> None:
    expected = store.search(DOCS_INDEX, "quantisation")
    damage(store.folder / DOCS_INDEX)
    assert store.search(DOCS_INDEX, "quantisation") == expected
    assert [card.id for card in store.cards()] == [DOCS_INDEX]


def test_an_index_that_lost_a_passage_is_built_again(store: IndexStore, docs: Path) -> None:
    expected = store.search(DOCS_INDEX, "quantisation")
    pieces = store.folder / DOCS_INDEX / store.cards()[0].generation / "passages.jsonl"
    pieces.write_text("".join(pieces.read_text().splitlines(keepends=True)[1:]))
    assert IndexStore(store.folder, docs).search(DOCS_INDEX, "quantisation") == expected


def test_sent_documents_are_kept_to_build_a_damaged_index_again(store: IndexStore) -> None:
    store.put("mine", MEMORY)
    expected = store.search("mine", "quantisation")
    for _ in range(2):
        shutil.rmtree(store.folder / "mine" / store.cards()[0].generation / "bm25-2")
        assert IndexStore(store.folder).search("mine", "quantisation") == expected


def test_an_index_of_another_version_is_built_again_and_says_so(
    store: IndexStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("zh", CHORES)
    expected = store.search("zh", "狗呢？")
    scores = store.folder / "zh" / store.cards()[0].generation / "bm25-2"
    scores.rename(scores.with_name("bm25"))
    again = IndexStore(store.folder)
    assert again.search("zh", "狗呢？") == expected
    assert "its terms are those of another version" in caplog.text


def test_a_large_index_takes_no_memory_of_the_process_that_answers(store: IndexStore) -> None:
    paragraphs = [f"Topic{number} is near topic{number % 997}. {FILLER}\n\n" for number in range(8000)]
    text = "".join(paragraphs)
    store.put("small", ZEPPELINS)
    assert store.search("small", "zeppelin")  # what is imported at first use is not counted
    tracemalloc.start()
    try:
        store.put("large", [IndexDocument(path="large.md", text=text)])
        built = tracemalloc.get_traced_memory()[1]
        assert "Topic7777 " in store.search("large", "topic7777")[0].text
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert built < 4 * len(text) and kept < len(text) / 4


def test_a_build_that_is_lost_says_so(tmp_path: Path) -> None:
    (tmp_path / DOCUMENTS).write_text("{" * 300_000)
    with pytest.raises(InvalidRequestError, match="ended with 1, perhaps for want of memory"):
        build(tmp_path)


def test_an_index_that_is_lost_with_its_documents_says_what_to_do(store: IndexStore) -> None:
    store.put("mine", MEMORY)
    shutil.rmtree(store.folder / "mine" / store.cards()[0].generation)
    again = IndexStore(store.folder)
    with pytest.raises(ConflictError, match="add them again"):
        again.search("mine", "quantisation")
    again.put("mine", ZEPPELINS)
    assert again.search("mine", "zeppelin")


def test_the_projects_own_documentation_answers(tmp_path: Path) -> None:
    found = IndexStore(tmp_path / "indexes").search(DOCS_INDEX, "which presets exist")
    assert any("preset" in passage.source for passage in found)
