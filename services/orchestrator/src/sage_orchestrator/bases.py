"""Base models: which are on this machine, and which names mean one. Torch-free."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from sage_contracts.home import Home

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def is_folder_path(name: str, home: Home) -> bool:
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        return True
    # `finetune_output/code` looks like a Hub id, but means a place in the home.
    return "/" in name and os.path.isdir(home.resolve(name).parent)  # noqa: PTH112 - as below


def find_folder(name: str, home: Home) -> Path | None:
    """The folder of a base model that is on this machine: by path, or by its name under the home."""
    from sage.tools.finetune.base_models import folder_name

    for folder in (home.resolve(name), home.base_models / folder_name(name)):
        if os.path.isfile(folder / "config.json"):  # noqa: PTH113 - Path's raises for what cannot be a name
            return folder
    return None


def present(home: Home) -> list[str]:
    """Names of the base models under the home, as users say them."""
    # A Hub id's slash is two dashes in its folder's name.
    return sorted(
        folder.parent.name.replace("--", "/", 1) for folder in home.base_models.glob("*/config.json")
    )


def is_known(name: str, home: Home) -> bool:
    """Whether a job may name it and needs no hub for it."""
    return find_folder(name, home) is not None or name in trainable(home)


def trainable(home: Home) -> list[str]:
    """What is here, and the built-in name that is fetched at first use."""
    from sage.tools.finetune.base_models import SMOLLM2

    return sorted({*present(home), SMOLLM2})


def closest_first(name: str, known: Iterable[str]) -> list[str]:
    """All names, those that look like `name` first: what a typing mistake meant is read first."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return [*close, *(other for other in names if other not in close)]
