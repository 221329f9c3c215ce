"""Where torch's random numbers stand, on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RandomNumbers:
    """As they were at one moment."""

    cpu: Any
    cuda: list[Any]

    @classmethod
    def now(cls) -> RandomNumbers:
        import torch

        on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(torch.get_rng_state(), on_devices)

    def put_back(self) -> None:
        import torch

        torch.set_rng_state(self.cpu)
        if self.cuda and torch.cuda.is_available():
            # The machine where they were taken may have had more devices.
            torch.cuda.set_rng_state_all(self.cuda[: torch.cuda.device_count()])
