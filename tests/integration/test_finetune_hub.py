"""Models and data sets come from a hub, and tuned models go there; nothing else asks one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tests.fakes.asgi_server import serving
from tests.fakes.fake_hub import REVISION, TOKEN, FakeHub
from tests.fakes.tiny_llama import make_model
from tests.integration.preference_runs import write_pairs

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
    unwanted = ("pytorch_model.bin", "consolidated.safetensors")
    for name in unwanted:
        (made / name).write_bytes(b"the same weights once more")
    home = tmp_path / "home"
    folder, said = resolve("org/tiny", url, home)
    assert folder == str(home / "base_models" / "org--tiny"), said
    assert (Path(folder) / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert not any((Path(folder) / name).exists() for name in unwanted)
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


def test_after_a_download_that_broke_off_whole_files_are_kept(hub: FakeHub, url: str, tmp_path: Path) -> None:
    made = make_model(hub.root / "models" / "org" / "tiny")
    large = made / "more.safetensors"
    large.write_bytes(os.urandom(24 << 20))  # a part of it, ten megabytes, is written before the hub fails
    hub.broken_files.add(large.name)
    home = tmp_path / "home"
    folder, said = resolve("org/tiny", url, home)
    assert folder == ""
    assert "The download of org/tiny broke off" in said
    assert "503" in said
    assert not (home / "base_models" / "org--tiny").exists()
    hub.broken_files.clear()
    killed = home / "base_models" / ".cache" / "org--tiny.part" / ".cache" / "more.1234.incomplete"
    killed.write_bytes(b"what a process that was killed had of it")
    hub.served.clear()
    folder, said = resolve("org/tiny", url, home)
    assert (Path(folder) / large.name).read_bytes() == large.read_bytes(), said
    assert "config.json" not in [name for name, _ in hub.served], "it was here already"
    assert sorted(path.name for path in (home / "base_models").iterdir()) == [".cache", "org--tiny"]


def test_a_full_disk_is_said_before_anything_is_downloaded(hub: FakeHub, url: str, tmp_path: Path) -> None:
    make_model(hub.root / "models" / "org" / "huge")
    hub.sizes["model.safetensors"] = 1 << 60
    folder, said = resolve("org/huge", url, tmp_path / "home")
    assert folder == ""
    assert "The base model org/huge needs" in said
    assert hub.served == []


def test_a_repository_without_a_whole_model_is_said_to_have_none(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    adapter = hub.root / "models" / "org" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"few")
    folder, said = resolve("org/adapter", url, tmp_path / "home")
    assert folder == ""
    assert "org/adapter holds no whole model" in said
    assert hub.served == []


def test_an_unknown_model_is_said_to_be_unknown(url: str, tmp_path: Path) -> None:
    folder, said = resolve("org/nothing", url, tmp_path / "home")
    assert folder == ""
    assert "knows no model org/nothing" in said


def make_questions(hub: FakeHub) -> Path:
    folder = hub.root / "datasets" / "org" / "questions"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"question": f"What is {split} {n}?", "answer": f"It is {n}."} for n in range(count)]
        (folder / "data" / f"{split}-00000.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "README.md").write_text("# Questions")
    return folder


VALIDATE = [*SAGE, "finetune", "validate"]


def test_a_data_set_is_read_by_its_id_and_only_its_train_split(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    make_questions(hub)
    done = run([*VALIDATE, "org/questions", "--json"], url, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["good"], found["bad"]) == (3, 3, [])
    assert found["notes"][1] == "left out of org/questions: its split test (data/test-00000.jsonl)"
    hub.sizes["data/train-00000.jsonl"] = 1 << 60  # which is no matter, as the file is here
    assert run([*VALIDATE, "org/questions"], url, tmp_path / "home").returncode == 0


def test_of_a_data_sets_configurations_one_is_chosen_after_a_colon(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    folder = make_questions(hub)
    (folder / "more.jsonl").write_text(json.dumps({"question": "Q", "answer": "A"}))
    configs = {"train": "data/train-*", "all": "**"}
    card = {"configs": [{"config_name": name, "data_files": path} for name, path in configs.items()]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# Questions")
    done = run([*VALIDATE, "org/questions"], url, tmp_path / "home")
    assert done.returncode == 2
    assert "the configurations train and all" in done.stderr
    assert hub.served == []
    done = run([*VALIDATE, "org/questions:all", "--json"], url, tmp_path / "home")
    assert json.loads(done.stdout)["rows"] == 6, done.stderr


def test_an_unknown_data_set_is_said_to_be_neither(url: str, tmp_path: Path) -> None:
    done = run([*VALIDATE, "org/nothing"], url, tmp_path / "home")
    assert done.returncode == 2
    assert "neither a file nor a data set org/nothing" in done.stderr + done.stdout


def test_a_data_set_that_the_disk_has_no_room_for_is_not_begun(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    make_questions(hub)
    hub.sizes["data/train-00000.jsonl"] = 1 << 60
    said = run([*VALIDATE, "org/questions"], url, tmp_path / "home")
    assert said.returncode != 0
    assert "The data set org/questions needs" in said.stderr
    assert "set HF_HOME to another disk" in said.stderr
    assert hub.served == []


def test_a_data_set_whose_download_broke_off_is_said_to_have(hub: FakeHub, url: str, tmp_path: Path) -> None:
    data = make_questions(hub) / "data" / "train-00000.jsonl"
    data.write_text("\n".join(json.dumps({"text": os.urandom(512).hex()}) for _ in range(24 << 10)))
    hub.broken_files.add(data.name)
    said = run([*VALIDATE, "org/questions"], url, tmp_path / "home")
    assert said.returncode == 2
    assert "The download of the data set org/questions broke off" in said.stderr
    assert "503" in said.stderr


def push(folder: Path, url: str, home: Path, option: str = "") -> subprocess.CompletedProcess[str]:
    """To me/code."""
    code = (
        "import sys; from pathlib import Path\n"
        "from sage.tools.finetune.exporting.packing import push_to_hub\n"
        f"print(push_to_hub(Path(sys.argv[1]), 'me/code', {option}))"
    )
    # Large files go by LFS here, as they do to a hub without Xet.
    env = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return run(["-c", code, str(folder)], url, home, env)


def test_a_tuned_model_is_pushed_whole_into_a_private_repository(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "tuned")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tuned\n")
    done = push(folder, url, tmp_path / "home")
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


def test_a_public_repository_is_not_written_to_unless_it_is_meant(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    public = hub.root / "models" / "me" / "code"
    public.mkdir(parents=True)
    (public / "README.md").write_text("Mine")
    folder = make_model(tmp_path / "tuned")
    refused = push(folder, url, tmp_path / "home")
    assert "Everybody may read me/code on the Hub" in refused.stderr
    assert "--allow-public" in refused.stderr
    assert [path.name for path in public.iterdir()] == ["README.md"] and hub.commits == []
    done = push(folder, url, tmp_path / "home", "allow_public=True")
    assert done.stdout.strip() == f"{url}/me/code", done.stderr
    assert (public / "model.safetensors").is_file() and hub.private == set()


def test_an_export_to_a_public_repository_is_refused_before_anything_is_computed(
    hub: FakeHub, url: str, tmp_path: Path
) -> None:
    (hub.root / "models" / "me" / "code").mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path\n"
        "from sage.tools.finetune.exporting.export import ExportWish, export_model\n"
        "nowhere = Path(sys.argv[1])\n"
        "export_model(nowhere, nowhere, nowhere / 'out', ExportWish('hub', 'code-1', repo='me/code'))"
    )
    refused = run(["-c", code, str(tmp_path / "nowhere")], url, tmp_path / "home", {"HF_TOKEN": TOKEN})
    assert "Everybody may read me/code on the Hub" in refused.stderr


def test_a_private_repository_is_written_to_again(hub: FakeHub, url: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from sage.tools.finetune.exporting.packing import push_to_hub\n"
        "print(push_to_hub(Path(sys.argv[1]), 'me/code'), push_to_hub(Path(sys.argv[1]), 'me/code'))"
    )
    env = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    done = run(["-c", code, str(make_model(tmp_path / "tuned"))], url, tmp_path / "home", env)
    assert done.stdout.split() == [f"{url}/me/code"] * 2, done.stderr


ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (ADAPTER, ["config.json", "model.safetensors"]),
        (["config.json", "model.safetensors"], ADAPTER),
        (["config.json", "model.safetensors.index.json", *SHARDS], ["config.json", "model.safetensors"]),
        (["config.json", "model.safetensors"], ["config.json", "model.safetensors.index.json", *SHARDS]),
    ],
)
def test_no_weights_stay_from_the_push_before(
    hub: FakeHub, url: str, tmp_path: Path, before: list[str], now: list[str]
) -> None:
    """Programs would load them in place of what was pushed now, or beside it."""
    for step, names in (("before", before), ("now", now)):
        folder = tmp_path / step
        folder.mkdir()
        for name in names:
            (folder / name).write_text(f"{name} {step}")
        done = push(folder, url, tmp_path / "home")
        assert done.stdout.strip() == f"{url}/me/code", done.stderr
        (hub.root / "models" / "me" / "code" / "NOTES.md").write_text("Mine")
    pushed = {path.name: path.read_text() for path in (hub.root / "models" / "me" / "code").iterdir()}
    assert pushed == {name: f"{name} now" for name in now} | {"NOTES.md": "Mine"}


def test_why_an_upload_broke_off_is_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailableError, match=r"404 Not Found.*Export a zip"):
        push_to_hub(make_model(tmp_path / "tuned"), "me/code", token=TOKEN, endpoint=url)  # it has no Xet


def test_a_wrong_token_is_said_to_be_wrong(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not let this token write"):
        push_to_hub(make_model(tmp_path / "tuned"), "me/code", token="hf_wrong", endpoint=url)


RUNS = """
import sys
from pathlib import Path

from tests.integration.preference_runs import METHODS, settings

from sage.tools.finetune import LoRATrainer
from sage.tools.finetune.exporting.export import ExportWish, export_model

base, pairs, rows, out = map(Path, sys.argv[1:])
few = {"max_steps": 2, "save_steps": 1, "sample_prompts": ["Number 1?"]}
for method in (*METHODS, "sft"):
    config = settings(base, rows if method == "sft" else pairs, out / method, method=method, **few)
    config.model_name = "org/tiny"
    for resume in (False, True):
        done = LoRATrainer(config, (), home=out.parent, resume=resume).train()
for content in ("merged", "adapter"):
    wish = ExportWish("zip", "sft-1", content=content)
    export_model(base, done.adapter_dir, out / content, wish)
"""


def test_runs_and_exports_with_a_base_that_is_here_ask_no_hub(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base_models" / "org--tiny")
    (base / "sage_base.json").write_text('{"source": "hub:org/tiny"}')
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(f'{{"question": "Number {n}?", "answer": "Yes."}}' for n in range(30)))
    words = [base, write_pairs(tmp_path / "pairs.jsonl"), rows, tmp_path / "out"]
    asked: list[str] = []

    async def refuse(request: Request) -> Response:
        asked.append(f"{request.method} {request.url.path}")
        return Response(status_code=404)

    methods = ["GET", "HEAD", "POST", "PUT"]
    everywhere = Starlette(routes=[Route("/{path:path}", refuse, methods=methods)])
    with serving(everywhere) as url:
        # On CI machines TRL does not report by itself.
        env = {"CI": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = run(["-c", RUNS, *map(str, words)], url, tmp_path / "home", env)
    assert done.returncode == 0, done.stderr
    assert asked == []
