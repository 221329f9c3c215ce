"""Models and data sets come from a hub, and tuned models go there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.fakes.asgi_server import serving
from tests.fakes.fake_hub import REVISION, TOKEN, FakeHub
from tests.fakes.tiny_llama import make_model

from sage.tools.finetune.base_models import base_info
from sage.tools.finetune.exporting.packing import push_to_hub
from sage_contracts.errors import InvalidRequestError, ServiceUnavailableError

SAGE = ["-c", "from sage_cli.main import main; main()"]


@pytest.fixture
def hub(tmp_path: Path) -> FakeHub:
    return FakeHub(tmp_path / "hub")


@pytest.fixture
def url(hub: FakeHub) -> Iterator[str]:
    with serving(hub.app) as url:
        yield url


def run(
    words: list[str], url: str, home: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    own = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf"), "SAGE_HOME": str(home)}
    inherited = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return subprocess.run(
        [sys.executable, *words],
        env={**inherited, **own, "COLUMNS": "200", **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def resolve(name: str, url: str, home: Path, env: Mapping[str, str] | None = None) -> tuple[str, str]:
    """(the folder, what was said otherwise)."""
    code = (
        "import sys; from pathlib import Path; from sage.tools.finetune.base_models import resolve_base\n"
        "print(resolve_base(sys.argv[1], Path(sys.argv[2])))"
    )
    done = run(["-c", code, name, str(home)], url, home, env)
    return done.stdout.strip(), done.stderr


def test_a_base_model_is_fetched_once_with_its_revision_and_licence(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    made = make_model(hub.root / "models" / "org" / "tiny")
    (made / "pytorch_model.bin").write_bytes(b"a pickle, which is not to be fetched")
    home = tmp_path / "home"
    folder, said = resolve("org/tiny", url, home)
    assert folder == str(home / "base_models" / "org--tiny"), said
    assert (Path(folder) / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert not (Path(folder) / "pytorch_model.bin").exists()
    assert base_info(Path(folder)) == {
        "source": "hub:org/tiny",
        "revision": REVISION,
        "license": "apache-2.0",
    }
    assert resolve("org/tiny", "http://127.0.0.1:9", home)[0] == folder, "it asks the hub again"


def test_a_gated_model_asks_for_the_token_and_takes_it(hub: FakeHub, url: str, tmp_path: Path) -> None:
    make_model(hub.root / "models" / "org" / "secret")
    hub.gated.add("models/org/secret")
    home = tmp_path / "home"
    folder, said = resolve("org/secret", url, home)
    assert folder == ""
    assert "Set HF_TOKEN" in said
    assert not list((home / "base_models").glob("org*"))
    assert resolve("org/secret", url, home, {"HF_TOKEN": TOKEN})[0].endswith("org--secret")


def test_an_unknown_model_is_said_to_be_unknown(url: str, tmp_path: Path) -> None:
    folder, said = resolve("org/nothing", url, tmp_path / "home")
    assert folder == ""
    assert "knows no model org/nothing" in said


def test_a_data_set_is_read_by_its_id_and_only_its_train_split(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    folder = hub.root / "datasets" / "org" / "questions"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"question": f"What is {split} {n}?", "answer": f"It is {n}."} for n in range(count)]
        (folder / "data" / f"{split}-00000.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "README.md").write_text("# Questions")
    validate = [*SAGE, "finetune", "validate", "org/questions", "--json"]
    done = run(validate, url, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["good"], found["bad"]) == (3, 3, [])


def test_an_unknown_data_set_is_said_to_be_neither(url: str, tmp_path: Path) -> None:
    done = run([*SAGE, "finetune", "validate", "org/nothing"], url, tmp_path / "home")
    assert done.returncode == 2
    assert "neither a file nor a data set org/nothing" in done.stderr + done.stdout


def test_a_tuned_model_is_pushed_whole_into_a_private_repository(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "tuned")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tuned\n")
    code = (
        "import sys; from pathlib import Path; from sage.tools.finetune.exporting.packing import push_to_hub\n"
        "print(push_to_hub(Path(sys.argv[1]), 'me/code'))"
    )
    # Large files go by LFS here, as they do to a hub without Xet.
    env = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    done = run(["-c", code, str(folder)], url, tmp_path / "home", env)
    assert done.stdout.strip() == f"{url}/me/code", done.stderr
    pushed = hub.root / "models" / "me" / "code"
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in pushed.iterdir()) == names
    assert all((pushed / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert hub.commits == ["Upload a model tuned with SAGE"]
    assert "models/me/code" in hub.gated, "it is to be private"
    # What was pushed is a base model for whoever has the token.
    fetched, said = resolve("me/code", url, tmp_path / "other", {"HF_TOKEN": TOKEN})
    assert fetched.endswith("me--code"), said


def test_why_an_upload_broke_off_is_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailableError, match="404 Not Found.*Export a zip"):
        push_to_hub(make_model(tmp_path / "tuned"), "me/code", token=TOKEN, endpoint=url)  # it has no Xet


def test_a_wrong_token_is_said_to_be_wrong(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not let this token write"):
        push_to_hub(make_model(tmp_path / "tuned"), "me/code", token="hf_wrong", endpoint=url)
