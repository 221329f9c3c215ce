"""One model in shards over all processes (FSDP): for models that do not fit on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sage.tools.finetune.distributed.team import ProcessTeam
from sage.tools.finetune.modeling import causal_of
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidRequestError


def require_shardable(config: TrainingConfig) -> None:
    """Raises: InvalidRequestError for settings whose weights cannot be cut up."""
    if config.load_in_8bit or config.load_in_4bit:
        raise InvalidRequestError(
            "distributed=fsdp cuts up plain weights, which load_in_8bit and load_in_4bit pack: leave those "
            "out, or use distributed=ddp.",
            param="distributed",
        )
    if config.tuning == "full":
        raise InvalidRequestError(
            "distributed=fsdp cuts up a frozen base under adapters: with tuning=full use distributed=ddp.",
            param="distributed",
        )
    if config.optim != "adamw_torch":
        raise InvalidRequestError("distributed=fsdp needs optim=adamw_torch.", param="optim")
    if config.precision == "fp16":
        raise InvalidRequestError(
            "distributed=fsdp does not scale losses, which fp16 needs: use precision=bf16 or fp32.",
            param="precision",
        )


class ShardedTeam(ProcessTeam):
    """Every decoder layer lies in shards, and comes together for as long as it is computed.

    The embedding, which the output layer often shares, stays whole: it is needed at both ends. A layer comes
    together only when all processes ask for it, so all make the same number of forward passes.
    """

    can_restore = False

    def share(self, groups: Sequence[list[int]], work: Callable[[list[int]], int]) -> list[list[int]]:
        rows = sorted((row for group in groups for row in group), key=lambda row: -work([row]))
        mine = rows[self.rank :: self.size]
        passes = -(-len(rows) // self.size)
        return [[row] for row in mine] + [[]] * (passes - len(mine))

    def idle(self, loss: Callable[[], Any]) -> None:
        nothing = loss() * 0.0
        if nothing.requires_grad:  # else this is an evaluation
            nothing.backward()

    def begin(self, model: Any, optimizer: Any) -> None:
        """Raises: InvalidRequestError for adapters outside the decoder layers."""
        _require_all_in_layers(model)
        super().begin(model, optimizer)
        whole = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        known = {parameter: optimizer.state.pop(parameter, {}) for parameter in whole}
        names = {parameter: name for name, parameter in model.named_parameters()}
        wanted = [names[parameter] for parameter in whole]
        self._shard(model)
        shards = dict(model.named_parameters())
        taken = iter(wanted)
        for group in optimizer.param_groups:
            group["params"] = [shards[next(taken)] for _ in group["params"]]
        for name, old in zip(wanted, whole, strict=True):
            if known[old]:
                optimizer.state[shards[name]] = _cut_like(shards[name], known[old])

    def _shard(self, model: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._state.device.type, (self.size,))
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
            # Sums, as everywhere here: the loss is divided by the labels of the whole step already. Gloo
            # knows no other way to reduce, either.
            layer.set_gradient_divide_factor(1.0)
            layer.set_force_sum_reduction_for_comms(True)
        for kept in (*model.parameters(), *model.buffers()):
            if not hasattr(kept, "full_tensor"):
                kept.data = kept.data.to(self._state.device)

    def held(self, model: Any) -> tuple[int, int]:
        """(parameters that this process holds, all of them)."""
        parameters = list(model.parameters())
        local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)
        return local, sum(p.numel() for p in parameters)

    def sum_gradients(self, parameters: Iterable[Any]) -> None:
        """Those of shards are sums already: the backward pass adds them up."""

    def whole(self, thing: Any) -> Any:
        return _Whole(thing)

    def attend_save(self, model: Any, optimizer: Any) -> None:
        _Whole(model).adapter_state()
        _Whole(optimizer).state_dict()


def _layers(model: Any) -> Any:
    causal = causal_of(model)
    return causal.get_decoder().layers


def _require_all_in_layers(model: Any) -> None:
    # One optimizer step cannot take parameters in shards and whole ones together.
    inside = {parameter for layer in _layers(model) for parameter in layer.parameters()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and p not in inside]
    if outside:
        raise InvalidRequestError(
            "distributed=fsdp trains adapters of the decoder layers only, and these are on others: "
            f"{', '.join(outside)}. Leave those layers out of lora.target_modules, or use distributed=ddp.",
            param="lora.target_modules",
        )


class _Whole:
    """A model or optimizer in shards as those who save one expect it. All processes have to save together."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing
        if hasattr(thing, "peft_config"):
            self.peft_config = thing.peft_config

    def save_pretrained(self, folder: str, **options: Any) -> None:
        self._thing.save_pretrained(folder, state_dict=self.adapter_state(), **options)

    def adapter_state(self) -> dict[str, Any]:
        trained = {name for name, parameter in self._thing.named_parameters() if parameter.requires_grad}
        return {name: _full(t) for name, t in self._thing.state_dict().items() if name in trained}

    def state_dict(self) -> Any:
        from torch.utils._pytree import tree_map

        return tree_map(_full, self._thing.state_dict())


def _full(value: Any) -> Any:
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def _cut_like(shard: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's optimizer state, cut up like the parameter."""
    from torch.distributed.tensor import distribute_tensor

    return {
        name: distribute_tensor(value, shard.device_mesh, shard.placements)
        if getattr(value, "shape", None) == shard.shape
        else value
        for name, value in state.items()
    }
