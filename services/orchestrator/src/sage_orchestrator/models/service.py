"""Tuned models: what there is, what a name means for serving, and forgetting one."""

from __future__ import annotations

import re

from sqlalchemy.orm import Session

from sage_contracts.errors import ConflictError, InvalidRequestError, ModelNotFoundError
from sage_contracts.home import Home
from sage_contracts.models import ModelCard, ModelInfo, ResolvedModel, checkpoint_name, split_checkpoint
from sage_contracts.paging import Deleted
from sage_orchestrator import bases
from sage_orchestrator.database import Database
from sage_orchestrator.jobs import repository as jobs
from sage_orchestrator.jobs.checkpoints import is_kept
from sage_orchestrator.merges import repository as merges
from sage_orchestrator.models import repository as models
from sage_orchestrator.rows import CheckpointRow, VersionRow

_BASE = "base:"
# More digits than this do not fit into the database's column.
_VERSION = re.compile(r"[0-9]{1,9}")


class ModelService:
    def __init__(self, database: Database, home: Home) -> None:
        self._database = database
        self._home = home

    def list_models(self) -> list[ModelCard]:
        """The bare names first, then every version, newest first."""
        with self._database.read() as session:
            aliases = models.aliases(session)
            rows = models.versions(session)
        named = {(row.name, row.version): row for row in rows}
        cards = [_card(named[name, version], is_alias=True) for name, version in aliases.items()]
        return [*cards, *(_card(row) for row in rows)]

    def get(self, model: str) -> ModelCard:
        """A name, version, checkpoint or `base:<model>`, or a base as jobs name it, unless a tuned model has
        that name. Raises: ModelNotFoundError, naming what there is."""
        if model.startswith(_BASE):
            self._resolve_base(model)
            return ModelCard(id=model, created=0)
        if checkpoint := split_checkpoint(model):
            name, _, row = self._find_checkpoint(model, *checkpoint)
            return ModelCard(id=name, created=int(row.created_at))
        with self._database.read() as session:
            version = _look_up(session, model)
            if version is None and not bases.is_known(model, self._home):
                raise self._not_found(session, model)
        return _card(version, is_alias="@" not in model) if version else ModelCard(id=model, created=0)

    def resolve(self, model: str) -> ResolvedModel:
        """What the inference host needs to serve this name. Raises: ModelNotFoundError."""
        if model.startswith(_BASE):
            return self._resolve_base(model)
        if checkpoint := split_checkpoint(model):
            name, version, row = self._find_checkpoint(model, *checkpoint)
            return _resolved(version).model_copy(
                update={"id": name, "adapter_path": row.path, "merged_path": None}
            )
        with self._database.read() as session:
            return _resolved(self.find(session, model))

    def delete(self, model: str) -> Deleted:
        """Forget a version, or with a bare name all of its versions. Files stay where they are, so nothing
        that serves them breaks, and numbers are not given again.

        Raises: ModelNotFoundError; InvalidRequestError for what is only files: a base, a checkpoint;
        ConflictError while one of them is being merged.
        """
        if self.get(model).sage is None:
            raise _only_files(model)
        with self._database.write() as session:
            name, _, version = model.partition("@")
            self.find(session, model)
            alias = models.lock_name(session, name)
            doomed = [
                row for row in models.versions(session, name) if not version or row.version == int(version)
            ]
            for row in doomed:
                if merges.unfinished(session, row.name, row.version) is not None:
                    raise ConflictError(f"{version_id(row)} is being merged: wait until that is done.")
                session.delete(row)
            session.flush()
            alias.alias_version = models.newest_version(session, name)
        return Deleted(id=model, object="model")

    def find(self, session: Session, model: str) -> VersionRow:
        """The version a name means, inside the caller's transaction. Raises: ModelNotFoundError."""
        row = _look_up(session, model)
        if row is None:
            raise self._not_found(session, model)
        return row

    def find_tuned(self, model: str) -> VersionRow | None:
        """The version that this name, or a checkpoint of this name, belongs to; None where it is none's."""
        checkpoint = split_checkpoint(model)
        with self._database.read() as session:
            return _look_up(session, checkpoint[0] if checkpoint else model)

    def _not_found(self, session: Session, model: str) -> ModelNotFoundError:
        versions = [version_id(row) for row in models.versions(session)]
        known = [
            *models.aliases(session),
            *versions,
            *(f"{_BASE}{name}" for name in bases.present(self._home)),
        ]
        there = ", ".join(bases.closest_first(model, known)[:20])
        hint = f"There are: {there}." if known else "None yet: `sage finetune quickstart` trains one."
        return ModelNotFoundError(f"There is no model {model!r}. {hint}", param="model")

    def _find_checkpoint(self, model: str, version: str, step: int) -> tuple[str, VersionRow, CheckpointRow]:
        """One that can be served, and its immutable name. Raises: ModelNotFoundError."""
        with self._database.read() as session:
            row = self.find(session, version)
            reported = jobs.checkpoints(session, row.job_id) if row.job_id else []
        result = f"ask for its job's result, {version_id(row)!r}"
        if not row.adapter_path:
            raise ModelNotFoundError(
                f"{version_id(row)} was tuned in full, and {model!r} cannot answer: {result}.", param="model"
            )
        wanted = next((found for found in reported if found.step == step), None)
        if wanted is not None and self._is_kept(wanted):
            return checkpoint_name(version_id(row), step), row, wanted
        # Each costs a look at the disk: the others are looked for only to tell of them.
        steps = ", ".join(str(found.step) for found in reported if self._is_kept(found)) or "none"
        raise ModelNotFoundError(
            f"There is no checkpoint {model!r}. A run keeps its newest (save_total_limit) and its best, "
            f"until the next run of its name begins. Steps that are there: {steps}; or {result}.",
            param="model",
        )

    def _is_kept(self, row: CheckpointRow) -> bool:
        return is_kept(self._home.resolve(row.path), row.job_id)

    def _resolve_base(self, model: str) -> ResolvedModel:
        name = model.removeprefix(_BASE)
        folder = bases.find_folder(name, self._home) if name else None
        if folder is None:
            with self._database.read() as session:
                raise self._not_found(session, model)
        return ResolvedModel(id=model, base_model=self._home.relative(folder))


def _look_up(session: Session, model: str) -> VersionRow | None:
    name, at, given = model.partition("@")
    version = models.alias_version(session, name) if not at else None
    if _VERSION.fullmatch(given):
        version = int(given)
    return None if version is None else models.get_version(session, name, version)


def _only_files(model: str) -> InvalidRequestError:
    what, where = "base model", "base_models/"
    if split_checkpoint(model):
        what, where = "checkpoint", "finetune_output/NAME/checkpoints/"
    return InvalidRequestError(
        f"{model} is a {what}, and only tuned models are deleted here, by name or by version. To make room, "
        f"remove its folder by hand: {where} in the stack's SAGE_HOME is where they are.",
        param="model",
    )


def version_id(row: VersionRow) -> str:
    return f"{row.name}@{row.version}"


def _resolved(row: VersionRow) -> ResolvedModel:
    return ResolvedModel(
        id=version_id(row),
        base_model=row.base_model,
        adapter_path=row.adapter_path or None,
        merged_path=row.merged_path,
        max_lora_rank=row.lora_rank,
        # As our trainers record it; versions of before, and those of others' trainers, have none.
        turn_end_ids=row.meta.get("turn_end_ids", []),
    )


def _card(row: VersionRow, *, is_alias: bool = False) -> ModelCard:
    return ModelCard(
        id=row.name if is_alias else version_id(row),
        created=int(row.created_at),
        sage=ModelInfo(
            name=row.name,
            version=row.version,
            alias_of=version_id(row) if is_alias else None,
            task=row.task or None,
            job_id=row.job_id,
            base_model=row.base_model,
            adapter_path=row.adapter_path,
            merged_path=row.merged_path,
            base_eval_loss=row.base_eval_loss,
            eval_loss=row.eval_loss,
            meta=row.meta,
        ),
    )
