"""What the processes of one run do together. Alone, a process is a team of one, and nothing is exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from sage.tools.finetune.callbacks import CallbackList, StopMode, TrainingCallback

EXCHANGE_TIMEOUT = timedelta(minutes=30)
"""The longest that one process waits for another: saving, or converting a base model, may take minutes."""


class Team:
    """One process alone."""

    rank = 0
    size = 1
    can_restore = True
    """Whether weights of a checkpoint can be put into the model once it trains."""

    def share(self, groups: Sequence[list[int]], work: Callable[[list[int]], int]) -> list[list[int]]:
        """This process's part of a step's forward passes; an empty one when others have one more.

        `work`: how many tokens a pass computes.
        """
        return list(groups)

    def begin(self, model: Any, optimizer: Any) -> None:
        """The model is ready: from here on all have the same."""

    def idle(self, loss: Callable[[], Any]) -> None:
        """Others have one more forward pass. `loss` is what one would be."""

    def whole(self, thing: Any) -> Any:
        """The model or optimizer as those who save one expect it."""
        return thing

    def attend_save(self, model: Any, optimizer: Any) -> None:
        """The first process saves a checkpoint: do what it needs the others for."""

    def begin_step(self, seed: int, step: int) -> None:
        """Random numbers of the step's dropout."""

    def sum_gradients(self, parameters: Iterable[Any]) -> None:
        """Add up what every process has found."""

    def total(self, value: float) -> float:
        """The sum over all processes."""
        return value


ALONE = Team()


def dealt(groups: Sequence[list[int]], work: Callable[[list[int]], int], hands: int) -> list[list[list[int]]]:
    """The groups dealt to `hands` processes, so that each has about as much work; filled up with empty
    groups to the same number, since all ask together after each whether to stop."""
    dealt_to: list[list[list[int]]] = [[] for _ in range(hands)]
    totals = [0] * hands
    for size, group in sorted(((work(group), group) for group in groups), key=lambda pair: -pair[0]):
        least = min(range(hands), key=lambda hand: (totals[hand], len(dealt_to[hand])))
        dealt_to[least].append(group)
        totals[least] += size
    most = max(map(len, dealt_to))
    return [hand + [[]] * (most - len(hand)) for hand in dealt_to]


class ProcessTeam(Team):
    """One of several processes, started with torch's own environment variables (RANK, WORLD_SIZE, …)."""

    def __init__(self, *, is_cpu: bool) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=is_cpu, timeout=EXCHANGE_TIMEOUT)
        self.rank = self._state.process_index
        self.size = self._state.num_processes

    def share(self, groups: Sequence[list[int]], work: Callable[[list[int]], int]) -> list[list[int]]:
        return dealt(groups, work, self.size)[self.rank]

    def begin(self, model: Any, optimizer: Any) -> None:
        from accelerate.utils import broadcast

        # Drawn from the same seed everywhere; but the run depends on it, so it is not left to chance.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(broadcast(parameter.data.contiguous(), from_process=0))

    def begin_step(self, seed: int, step: int) -> None:
        import torch

        # Each process drops other units, and the same ones again when the run is resumed.
        torch.manual_seed(hash((seed, step, self.rank)) & 0x7FFF_FFFF)

    def sum_gradients(self, parameters: Iterable[Any]) -> None:
        import torch
        from accelerate.utils import reduce

        trained = list(parameters)
        found = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in trained
        ]
        # One exchange for all of them: adapters are many and small.
        summed = reduce(torch.cat([gradient.reshape(-1).float() for gradient in found]), "sum")
        for parameter, part in zip(trained, summed.split([g.numel() for g in found]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def total(self, value: float) -> float:
        import torch
        from accelerate.utils import reduce

        return float(
            reduce(torch.tensor(value, dtype=torch.float64, device=self._state.device), "sum").item()
        )

    def leave(self) -> None:
        """Every process has finished its part."""
        self._state.wait_for_everyone()
        self._state.destroy_process_group()


class AgreedStop(CallbackList):
    """The callbacks of process 0, whose wish to stop is everybody's: all ask at the same points."""

    def __init__(self, callbacks: Sequence[TrainingCallback], team: ProcessTeam) -> None:
        super().__init__(callbacks if team.rank == 0 else ())
        self._team = team

    def should_stop(self) -> StopMode | None:
        from accelerate.utils import broadcast_object_list

        wish = [super().should_stop() if self._team.rank == 0 else None]
        broadcast_object_list(wish, from_process=0)
        return wish[0]
