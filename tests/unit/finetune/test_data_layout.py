"""Of a data set's files those to train on are chosen as its author divided them; what is left is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.data import load_rows, validate_file
from sage.tools.finetune.data.hub import is_hub_id, split_id
from sage.tools.finetune.data.layout import choose_files, split_of
from sage_contracts.errors import InvalidDataError

GSM8K = [
    f"{name}/{split}-00000-of-00001.parquet" for name in ("main", "socratic") for split in ("test", "train")
]
GSM8K_CARD = {
    "configs": [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in ("train", "test")],
        }
        for name in ("main", "socratic")
    ]
}
ULTRAFEEDBACK = [
    f"data/{split}_{kind}-00000-of-00001.parquet" for kind in ("prefs", "sft") for split in ("train", "test")
]


@pytest.mark.parametrize("card", [GSM8K_CARD, {}])
def test_of_several_configurations_one_has_to_be_chosen(card: dict[str, Any]) -> None:
    with pytest.raises(InvalidDataError, match=r"main and socratic.*as in openai/gsm8k:main"):
        choose_files("openai/gsm8k", GSM8K, card)
    found = choose_files("openai/gsm8k", GSM8K, card, ["socratic"])
    assert found.files == ["socratic/train-00000-of-00001.parquet"]
    assert found.notes == [
        "left out of openai/gsm8k:socratic: its split test (socratic/test-00000-of-00001.parquet)"
    ]
    assert choose_files("x", GSM8K, card, ["main", "test"]).files == ["main/test-00000-of-00001.parquet"]
    with pytest.raises(InvalidDataError, match=r"configurations main and socratic"):
        choose_files("openai/gsm8k", GSM8K, card, ["mian"])
    with pytest.raises(InvalidDataError, match=r"has no 'dev', but"):
        choose_files("openai/gsm8k", GSM8K, card, ["main", "dev"])


def test_the_cards_default_is_taken_and_the_others_are_named() -> None:
    entries = [{"config_name": "a", "data_files": "a/*.json"}, {"config_name": "b", "data_files": ["b/**"]}]
    files = ["a/1.json", "b/c/2.json", "other.json"]
    found = choose_files("o/n", files, {"configs": [entries[0], {**entries[1], "default": True}]})
    assert found.files == ["b/c/2.json"]
    assert found.notes == [
        "of o/n the default configuration is read; it also has a",
        "left out of o/n: what is of no configuration (other.json)",
    ]
    assert choose_files("o/n", files, {"configs": entries[:1]}).files == ["a/1.json"]
    assert choose_files("o/n", files, {"configs": "nonsense"}).files == files
    by_folder = {"configs": [{"config_name": "a", "data_dir": "b"}]}
    assert choose_files("o/n", files, by_folder).files == ["b/c/2.json"]


def test_of_several_training_splits_one_has_to_be_chosen() -> None:
    with pytest.raises(InvalidDataError, match=r"train_prefs and train_sft.*as in o/ultra:train_prefs"):
        choose_files("o/ultra", ULTRAFEEDBACK, {})
    found = choose_files("o/ultra", ULTRAFEEDBACK, {}, ["train_sft"])
    assert found.files == ["data/train_sft-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        (["train.json", "train.parquet"], ["train.json"]),
        (["data/train-00000-of-00001.parquet", "train.csv"], ["data/train-00000-of-00001.parquet"]),
        (["rows.jsonl", "rows.jsonl.gz"], ["rows.jsonl"]),
        (["a.csv", "a.jsonl", "b.csv"], ["a.jsonl", "b.csv"]),
        (["a.jsonl", "b.csv", "c/a.csv"], ["a.jsonl", "b.csv", "c/a.csv"]),
        (["0.json", "1.csv"], ["0.json", "1.csv"]),
        (["json/test.json", "parquet/test.parquet"], ["json/test.json"]),
    ],
)
@pytest.mark.parametrize("is_own_folder", [True, False])
def test_the_same_rows_in_two_containers_are_read_once(
    files: list[str], kept: list[str], is_own_folder: bool
) -> None:
    found = choose_files("o/n", files, {}, is_own_folder=is_own_folder)
    assert found.files == kept
    assert any("as the same rows in another form" in note for note in found.notes) == (files != kept)


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        (["train.json", "test.json", "dev.json"], ["train.json"]),
        (["a.json", "b.json", "validation.json"], ["a.json", "b.json"]),
        (["train/1.json", "train/2.json", "test/1.json"], ["train/1.json", "train/2.json"]),
        (["test.json", "validation.json"], ["test.json", "validation.json"]),
        (["latest.json", "contrain.json"], ["contrain.json", "latest.json"]),
        ([], []),
    ],
)
@pytest.mark.parametrize("is_own_folder", [True, False])
def test_what_is_held_out_is_not_trained_on(files: list[str], kept: list[str], is_own_folder: bool) -> None:
    assert choose_files("o/n", files, {}, is_own_folder=is_own_folder).files == kept


def test_a_folders_folders_are_read_together() -> None:
    files = [f"{name}/{split}.json" for name in ("de", "en") for split in ("test", "train")]
    assert choose_files("mine", files, {}, is_own_folder=True).files == ["de/train.json", "en/train.json"]
    with pytest.raises(InvalidDataError, match=r"configurations de and en"):
        choose_files("o/n", files, {})


def test_one_file_called_train_does_not_make_splits_of_a_folder() -> None:
    files = ["cats.json", "how-to-train-dogs.json"]
    assert choose_files("mine", files, {}, is_own_folder=True) == (files, [])
    assert choose_files("o/n", files, {}).files == files[1:]


def test_a_folder_with_splits_is_read_without_the_test_split_and_says_so(tmp_path: Path) -> None:
    for name in ("train", "test", "extra"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "A"}))
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    assert [row.value["question"] for row in load_rows(tmp_path)] == ["train"]
    assert validate_file(tmp_path, "rows").notes == [
        "1 file of the folder rows, in the order of their names",
        "left out of rows: its split test (test.jsonl), what is of no split (extra.jsonl)",
    ]


def test_a_downloaded_data_set_has_its_card_beside_it(tmp_path: Path) -> None:
    for file in GSM8K:
        path = (tmp_path / file).with_suffix(".jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"question": file, "answer": "A"}))
    assert len(list(load_rows(tmp_path))) == 2
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(GSM8K_CARD)}\n---\n# GSM8K\n")
    with pytest.raises(
        InvalidDataError, match=r"main and socratic.*such as main/train-00000-of-00001\.jsonl"
    ):
        list(load_rows(tmp_path))
    assert len(list(load_rows(tmp_path / "main"))) == 1
    (tmp_path / "README.md").write_text("---\n: [broken\n---\n")
    assert len(list(load_rows(tmp_path))) == 2


@given(st.lists(st.text(st.characters(exclude_characters="\0"), min_size=1), max_size=6, unique=True))
def test_any_names_are_chosen_from(stems: list[str]) -> None:
    files = [f"{stem}.jsonl" for stem in stems]
    found = choose_files("mine", files, {}, is_own_folder=True)
    assert set(found.files) <= set(files)
    assert bool(found.files) == bool(files)
    assert all(isinstance(split_of(file), str) for file in files)


def test_what_follows_a_hub_id_names_a_configuration_and_a_split() -> None:
    assert split_id("o/n") == ("o/n", [])
    assert split_id("o/n:main:train_sft") == ("o/n", ["main", "train_sft"])
    assert split_id("o/n:en/2024") == ("o/n", ["en/2024"])
    assert is_hub_id(Path("o/n:en/2024:test"))
    assert not is_hub_id(Path("o/n:a:b:c"))


@pytest.mark.parametrize("name", ["here/n", "here/n:main", "here/n:en/2024"])
def test_a_path_in_a_folder_that_is_there_is_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(Path(name))
    (tmp_path / "here").mkdir()
    assert not is_hub_id(Path(name))
