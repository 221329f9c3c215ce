"""From a name to what an engine can be given; what it cannot load as an adapter is merged first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sage_contracts.errors import ConflictError, EngineFailedError, ModelNotFoundError
from sage_contracts.home import Home
from sage_contracts.models import MergeJob, MergeStatus, split_checkpoint
from sage_inference.fit import Kind
from sage_inference.models import Wanted, locate
from sage_inference.orchestrator import Orchestrator
from sage_inference.policy import CRASH_WINDOW_S

_POLL_S = 1.0


class Finder:
    """Looks models up for one kind of engine."""

    def __init__(self, orchestrator: Orchestrator, home: Home, kind: Kind) -> None:
        self._orchestrator = orchestrator
        self._home = home
        self._kind = kind
        self._failed: dict[str, tuple[float, str]] = {}
        """Versions whose merge failed: when, and why."""

    async def find(self, name: str, *, is_fresh: bool = False) -> Wanted:
        """What the name means; with `merge_reason` set it has to go through `merged`.

        Raises: ModelNotFoundError, ServiceUnavailableError.
        """
        return locate(await self._orchestrator.resolve(name, is_fresh=is_fresh), self._home, self._kind)

    async def merged(self, wanted: Wanted, tell: Callable[[str], None]) -> Wanted:
        """Wait until the version is merged, by a merge of ours or one that is under way. Has no deadline:
        whoever waits cancels it, and the merge goes on.

        Raises: EngineFailedError with the merger's reason, ModelNotFoundError, ServiceUnavailableError.
        """
        # The name is immutable here: an alias that moves meanwhile does not change what was asked for.
        name, why = wanted.label, wanted.merge_reason
        if checkpoint := split_checkpoint(name):
            raise ModelNotFoundError(
                f"{name} would have to be merged, because {why}, and checkpoints are not: "
                f"ask for its job's result, {checkpoint[0]!r}.",
                param="model",
            )
        merge: MergeJob | None = None
        while merge is None:
            known = await self.find(name, is_fresh=True)
            if known.merge_reason is None:
                return known
            failed_at, reason = self._failed.get(name, (-CRASH_WINDOW_S, ""))
            if time.monotonic() - failed_at < CRASH_WINDOW_S:
                # Gigabytes and minutes: not again for every question. One made by hand is found above.
                raise _failure(name, why, reason)
            try:
                merge = await self._orchestrator.merge(name)
            except ConflictError:
                # Somebody has it merged with a dtype of their own, which serves as well.
                tell(f"waiting for the merge of {name} that is under way, because {why}")
                await asyncio.sleep(_POLL_S)
        while not merge.status.is_terminal:
            tell(f"merging {name} first, because {why} ({merge.phase or merge.status.value})")
            await asyncio.sleep(_POLL_S)
            merge = await self._orchestrator.merge_job(merge.id)
        if merge.status is MergeStatus.FAILED:
            reason = merge.error or "no reason was recorded"
            self._failed[name] = (time.monotonic(), reason)
            raise _failure(name, why, reason)
        self._failed.pop(name, None)
        ready = await self.find(name, is_fresh=True)
        if ready.merge_reason is not None:
            raise ModelNotFoundError(
                f"{name} was merged into {merge.merged_path}, which this host does not see: mount the same "
                "SAGE_HOME here.",
                param="model",
            )
        return ready


def _failure(name: str, why: str | None, reason: str) -> EngineFailedError:
    return EngineFailedError(
        f"{name} has to be merged first, because {why}, and that failed: {reason}. It is tried again after "
        f"{CRASH_WINDOW_S / 60:.0f} minutes; at once with: sage finetune merge {name}"
    )
