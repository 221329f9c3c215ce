"""How the forward passes of a step are dealt to processes, and how many processes a run takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.batching import micro_batches
from sage.tools.finetune.distributed.ranks import ranks_for
from sage.tools.finetune.distributed.team import ALONE, dealt
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidRequestError

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(lengths, st.integers(1, 8))
def test_every_row_is_dealt_to_one_hand_and_all_have_as_many_passes(rows: list[int], hands: int) -> None:
    shares = dealt(micro_batches(rows, 512), rows, hands)
    assert sorted(index for share in shares for group in share for index in group) == list(range(len(rows)))
    assert len({len(share) for share in shares}) == 1


@given(lengths, st.integers(1, 8))
def test_no_hand_has_more_than_its_share_and_one_pass(rows: list[int], hands: int) -> None:
    groups = micro_batches(rows, 512)
    tokens = [sum(rows[index] for group in share for index in group) for share in dealt(groups, rows, hands)]
    longest = max(sum(rows[index] for index in group) for group in groups)
    assert max(tokens) <= sum(rows) / hands + longest


def test_alone_everything_stays_as_it_is() -> None:
    assert ALONE.share([[1], [0]], [3, 2]) == [[1], [0]]
    assert ALONE.total(1.5) == 1.5


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [
        ({}, 1),
        ({"distributed": "ddp"}, 1),
        ({"distributed": "ddp", "num_devices": 2}, 2),
        ({"distributed": "fsdp", "num_devices": 2}, 2),
        ({"distributed": "off", "num_devices": 2}, 1),
        ({"distributed": "auto", "num_devices": 2}, 1),
        ({"distributed": "ddp", "num_devices": 2, "method": "dpo"}, 1),
    ],
)
def test_without_gpus_several_processes_are_taken_only_when_asked_for(
    fields: dict[str, object], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    from sage.tools.finetune.hardware import has_cuda

    has_cuda.cache_clear()
    assert ranks_for(TrainingConfig.model_validate(fields)) == ranks
    has_cuda.cache_clear()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"load_in_4bit": True}, "ddp"),
        ({"precision": "fp16"}, "bf16"),
        ({"optim": "paged_adamw_8bit"}, "adamw_torch"),
    ],
)
def test_what_cannot_be_cut_up_is_refused_with_a_way_out(fields: dict[str, object], said: str) -> None:
    config = TrainingConfig.model_validate({"distributed": "fsdp", "num_devices": 2, **fields})
    with pytest.raises(InvalidRequestError, match=said):
        ranks_for(config)
