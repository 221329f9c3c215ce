"""A folder as one archive, or as a repository on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

from sage.tools.finetune.base_models import hub_name, hub_revision
from sage.tools.finetune.storage import write_json
from sage_contracts.errors import InvalidRequestError, SageError, ServiceUnavailableError

# Left from a push of another kind they would be loaded in place of what is pushed now, or beside it.
_LOADED = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_COMPRESSED = {".json", ".txt", ".md", ".jinja", ".model", ".py"}


def make_portable(folder: Path, base: Path) -> None:
    """Take this machine's folders out of what is written beside the weights, before others get it.

    A base that only this machine has stays the path it is where an adapter is loaded by it.
    """
    settings = _read(folder / "training_config.json")
    for name in ("data_path", "output_dir"):
        if settings.get(name):
            settings[name] = Path(settings[name]).name
    if settings:
        write_json(folder / "training_config.json", settings)
    known = hub_name(settings.get("model_name", ""), base)
    if merge := _read(folder / "sage_merge.json"):
        write_json(folder / "sage_merge.json", {**merge, "base": known or base.name})
    adapters = _read(folder / "adapter_config.json")
    if adapters and known:
        # Versions of before say where their base lay.
        named = {"base_model_name_or_path": known, "revision": hub_revision(base)}
        write_json(folder / "adapter_config.json", {**adapters, **named})


def _read(path: Path) -> dict[str, Any]:
    """Empty where there is none: others' adapters come with less."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def zip_folder(folder: Path, target: Path) -> None:
    """With the folder's name as the one entry at the top. Weights do not compress, so they are stored."""
    with ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                method = ZIP_DEFLATED if path.suffix in _COMPRESSED else ZIP_STORED
                archive.write(path, path.relative_to(folder.parent), compress_type=method)


def require_token(token: str | None = None) -> str:
    """The given one, or huggingface_hub's own (HF_TOKEN, or a login). Raises: InvalidRequestError."""
    from huggingface_hub import get_token

    found = token or get_token()
    if not found:
        raise InvalidRequestError(
            "Pushing to the Hub needs a token that may write: set HF_TOKEN and start the stack again.",
            param="repo",
        )
    return found


def require_private(repo: str, *, token: str | None = None, endpoint: str | None = None) -> None:
    """Look at a repository; one that is not there yet is as good. Raises: as `push_to_hub`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _hub_errors(repo):
        try:
            info = HfApi(endpoint=endpoint, token=require_token(token)).repo_info(repo)
        except RepositoryNotFoundError:
            return
    if not info.private:
        raise InvalidRequestError(
            f"Everybody may read {repo} on the Hub, and files in it would be replaced or removed. Name"
            " another one, which is made private, or say that this one is meant: --allow-public"
            " (`allow_public`).",
            param="repo",
        )


def push_to_hub(
    folder: Path,
    repo: str,
    *,
    allow_public: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Create a private repository if need be, upload, and return its address.

    Weights and adapters that were there before and have no file of their name now are removed.
    Without `token` and `endpoint` huggingface_hub's own environment and login hold (HF_TOKEN, HF_ENDPOINT).
    Raises: InvalidRequestError without a token or right, and for a public repository that is not allowed;
    ServiceUnavailableError.
    """
    from huggingface_hub import HfApi

    token = require_token(token)
    with _hub_errors(repo):
        api = HfApi(endpoint=endpoint, token=token)
        address = api.create_repo(repo, private=True, exist_ok=True)
        if not allow_public:
            # Only now: one that was there before stays what it was.
            require_private(repo, token=token, endpoint=endpoint)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload a model tuned with SAGE",
            delete_patterns=list(_LOADED),
        )
    return str(address)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except SageError:
        raise
    except HFValidationError as error:
        raise InvalidRequestError(f"{repo!r} is no name of a repository: {error}", param="repo") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise InvalidRequestError(
                f"The Hub does not let this token write to {repo} (HTTP {status}).", param="repo"
            ) from error
        raise ServiceUnavailableError(f"The Hub refused the upload to {repo}: {error}") from error
    except Exception as error:  # httpx, DNS, proxies, offline mode, Xet's own
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ServiceUnavailableError(
            f"The upload to the Hub did not succeed ({why}). Export a zip, or try again later."
        ) from error
