"""Where weights come to lie for a run on a CPU: with the numbers of the file, and in the file no more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from sage.tools.finetune.losses import FusedLoss
from sage.tools.finetune.modeling import add_adapters, load_base
from sage.tools.finetune.weights_layout import lay_out, stored_half
from sage.tools.finetune.widening import computing_dtype
from sage_contracts.config import TrainingConfig

Precision = Literal["fp32", "bf16"]
_OURS = {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 32}
SIZES_OF = {
    "gemma": _OURS,
    "gemma3_text": _OURS,
    "granite": _OURS,
    "falcon_h1": _OURS | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
}


def stored_in(dtype: Any, base: Path, to: Path) -> Path:
    """The same model in that format, with weights that no half precision holds."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=1e-3)
    shutil.copytree(base, to)
    model.to(dtype).save_pretrained(str(to))
    return to


def loaded(base: Path, precision: Precision, **changes: Any) -> Any:
    return load_base(base, TrainingConfig(**changes), "cpu", precision)


def as_transformers_loads(base: Path, precision: Precision) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return dict(AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype).state_dict())


@pytest.mark.compiler
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_those_that_transformers_loads(
    tiny_base: Path, tmp_path: Path, stored: str, precision: Precision
) -> None:
    import torch

    base = stored_in(getattr(torch, stored), tiny_base, tmp_path / "base")
    model = loaded(base, precision)

    wanted, found = as_transformers_loads(base, precision), model.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        # Of the 258 tokens no product in C reads them as they are.
        stays = stored == "bfloat16" and weight.dim() == 2 and len(weight) != 258
        assert found[name].dtype == (torch.bfloat16 if stays else weight.dtype), name
        assert found[name].to(weight.dtype).equal(weight), name
    assert model.config.dtype == computing_dtype(model) == next(iter(wanted.values())).dtype


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lora": {"use_dora": True}}, id="DoRA"),
        pytest.param({"lora": {"bias": "lora_only"}}, id="biases"),
        pytest.param({"method": "dpo"}, id="preferences"),
    ],
)
def test_runs_that_multiply_by_torch_have_their_weights_widened_once(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    import torch

    base = stored_in(torch.bfloat16, tiny_base, tmp_path / "base")
    assert {weight.dtype for weight in loaded(base, "fp32", **changes).parameters()} == {torch.float32}


def test_without_kernels_in_c_weights_are_widened_once(tiny_base: Path, tmp_path: Path) -> None:
    import torch

    base = stored_in(torch.bfloat16, tiny_base, tmp_path / "base")
    code = (
        "import sys; from pathlib import Path; from sage.tools.finetune.modeling import load_base\n"
        "from sage_contracts.config import TrainingConfig\n"
        "model = load_base(Path(sys.argv[1]), TrainingConfig(), 'cpu', 'fp32')\n"
        "print({str(weight.dtype) for weight in model.parameters()})"
    )
    env = {**os.environ, "SAGE_CPU_KERNELS": "0"}
    command = [sys.executable, "-c", code, str(base)]
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True).stdout
    assert told.strip() == "{'torch.float32'}"


@pytest.mark.parametrize("family", ["gpt2", "gemma", "gemma3_text", "granite", "falcon_h1"])
def test_other_families_are_what_transformers_loads_too(tmp_path: Path, family: str) -> None:
    """Some scale embeddings by a factor that they round to the number format that they are built in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 256, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes, **SIZES_OF.get(family, {}))
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    found = loaded(tmp_path, "fp32")
    for parts in ("named_parameters", "named_buffers"):
        expected, given = dict(getattr(wanted, parts)()), dict(getattr(found, parts)())
        assert expected.keys() == given.keys()
        for name, value in expected.items():
            assert given[name].dtype == value.dtype, name
            assert given[name].equal(value), name


def test_a_config_that_names_less_precision_than_is_stored_takes_none_away(
    tiny_base: Path, tmp_path: Path
) -> None:
    import torch

    base = stored_in(torch.float32, tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    model = loaded(base, "fp32")
    kept = model.model.norm.weight
    assert not kept.bfloat16().float().equal(kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_nothing_of_the_file_stays_in_memory(tiny_base: Path, tmp_path: Path, precision: Precision) -> None:
    import torch

    base = stored_in(torch.bfloat16, tiny_base, tmp_path / "base")
    model = loaded(base, precision)
    assert str(base) not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight.isfinite().all()  # it is there all the same


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fusing_layers_copies_nothing(
    tiny_base: Path, tmp_path: Path, precision: Precision, stored: str
) -> None:
    import torch

    config, base = TrainingConfig(), stored_in(getattr(torch, stored), tiny_base, tmp_path / "base")
    model = add_adapters(loaded(base, precision), config.lora)
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    FusedLoss(model)
    assert before == {name: weight.data_ptr() for name, weight in model.named_parameters()}


def test_a_model_that_trains_whole_has_weights_that_can_be_saved(tiny_base: Path, tmp_path: Path) -> None:
    model = loaded(tiny_base, "fp32", tuning="full")
    model.save_pretrained(str(tmp_path / "saved"))
    assert stored_half(tmp_path / "saved") is None
    places = [weight.untyped_storage().data_ptr() for weight in model.parameters()]
    assert len(set(places)) == len(places)


def test_weights_that_a_family_wants_in_fp32_stay_in_it(tiny_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_base), dtype=torch.bfloat16)
    model.model.norm.float()
    lay_out(model, torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_only_what_is_all_in_one_half_precision_is_widened_later(tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    for dtype, wanted in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, None),
    ):
        assert stored_half(stored_in(dtype, tiny_base, tmp_path / str(dtype))) == wanted

    mixed = shutil.copytree(tmp_path / str(torch.bfloat16), tmp_path / "mixed")
    weights = load_file(mixed / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, mixed / "model.safetensors", metadata={"format": "pt"})
    assert stored_half(mixed) is None

    (mixed / "model.safetensors").write_bytes(b"not one")
    assert stored_half(mixed) is None
    assert stored_half(tmp_path / "nowhere") is None
