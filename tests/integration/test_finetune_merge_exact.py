"""Merged tensor by tensor, every kind of adapter gives the weights that peft's own merge gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.tiny_llama import make_model

from sage.tools.finetune.merging.folder import write_model
from sage.tools.finetune.merging.tensor_files import stored_tensors
from sage.tools.finetune.merging.weights import merged_weights
from sage_contracts.errors import InvalidRequestError, ModelNotFoundError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ATTENTION},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "mica": {"target_modules": ATTENTION, "init_lora_weights": "mica"},
    "all-linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding-dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "modules-to-save": {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"1.+v_proj": 3},
    },
}
BIASED: dict[str, dict[str, Any]] = {
    "bias-all": {"target_modules": ATTENTION, "bias": "all"},
    "bias-lora-only": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ATTENTION, "lora_bias": True},
}
CONV1D: dict[str, dict[str, Any]] = {
    "conv1d": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "conv1d-dora": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
}


def make_gpt2(folder: Path) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def make_variant(folder: Path, base: Path, kind: dict[str, Any]) -> Path:
    """An adapter of this kind, every part of it away from where it starts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **kind))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    embedding = "embed_tokens" in kind["target_modules"]
    tuned.save_pretrained(folder, save_embedding_layers=embedding)
    return folder


def merged_by_peft(base: Path, adapter: Path, folder: Path) -> Path:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, str(adapter))
    tuned.merge_and_unload(safe_merge=True).save_pretrained(folder)
    return folder


def merged_by_us(base: Path, adapter: Path, folder: Path, code: str | None = "F32", **options: Any) -> Path:
    folder.mkdir()
    write_model(merged_weights(base, adapter), folder, code, **options)
    return folder


def assert_alike(ours: Path, theirs: Path, *, ulps: int) -> None:
    """Bit by bit, or within so many units in the last place of the largest number of a row."""
    import numpy as np

    left, right = stored_tensors(ours), stored_tensors(theirs)
    assert left.keys() == right.keys()
    for name in left:
        a, b = left[name].read(), right[name].read()
        assert a.shape == b.shape, name
        ulp = np.spacing(np.abs(b).max(axis=-1, keepdims=True))
        assert (np.abs(a - b) <= ulps * ulp).all(), (name, np.abs(a - b).max())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")
    makers: dict[str, Callable[[Path], Path]] = {
        "llama": make_model,
        "biased": lambda path: make_model(path, attention_bias=True),
        "gpt2": make_gpt2,
    }

    def base(name: str) -> Path:
        return folder / name if (folder / name).exists() else makers[name](folder / name)

    return base


# peft 0.21 takes the bias of B for a matrix that was not gathered.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *(("llama", name) for name in KINDS),
        *(("biased", name) for name in BIASED),
        *(("gpt2", name) for name in CONV1D),
    ],
)
def test_every_kind_of_adapter_is_merged_as_peft_merges_it(
    bases: Callable[[str], Path], tmp_path: Path, model: str, kind: str
) -> None:
    base = bases(model)
    adapter = make_variant(tmp_path / "adapter", base, (KINDS | BIASED | CONV1D)[kind])
    ours = merged_by_us(base, adapter, tmp_path / "ours")
    theirs = merged_by_peft(base, adapter, tmp_path / "theirs")
    # DoRA divides by the norm of a whole row or column, whose sum depends on the order of its terms.
    assert_alike(ours, theirs, ulps=6 if "dora" in kind else 0)


@pytest.mark.parametrize("code", ["F16", "BF16", None])
def test_shards_are_read_and_written_and_numbers_rounded_as_torch_does(
    tmp_path: Path, code: str | None
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    plain = make_model(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    adapter = make_variant(tmp_path / "adapter", plain, KINDS["lora"])

    ours = merged_by_us(tmp_path / "base", adapter, tmp_path / "ours", code, max_shard_bytes=100_000)

    theirs = merged_by_peft(tmp_path / "base", adapter, tmp_path / "theirs")
    shards = sorted(ours.glob("*.safetensors"))
    assert len(shards) > 2
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    wanted = load_file(theirs / "model.safetensors")
    dtype = torch.float16 if code == "F16" else torch.bfloat16
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].to(dtype)) for name in wanted)
    loaded = AutoModelForCausalLM.from_pretrained(ours, dtype="auto")
    assert loaded.dtype == dtype


@pytest.mark.parametrize("kind", ["embedding", "head", "modules-to-save"])
# peft warns that its own merge of a tied pair goes wrong.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_tied_pair_that_the_adapter_tells_apart_is_parted(tmp_path: Path, kind: str) -> None:
    from sage.tools.finetune.merging.parity import ask_tuned, compare_folder

    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    assert "lm_head.weight" not in stored_tensors(base)
    adapter = make_variant(tmp_path / "adapter", base, KINDS[kind])

    merged = merged_by_us(base, adapter, tmp_path / "merged")

    config = json.loads((merged / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    parity = compare_folder(ask_tuned(base, adapter), merged, "float32")
    assert parity.same == parity.probes
    assert parity.max_logit_diff < 1e-3 < parity.base_kl


def change_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_cannot_be_merged_is_said(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    adapter = make_variant(tmp_path / "adapter", base, KINDS["lora"])
    for start in ("pissa", "lora_ga"):
        change_config(adapter, init_lora_weights=start)
        with pytest.raises(InvalidRequestError, match=f"{start}.*changes the base"):
            merged_weights(base, adapter)
    change_config(adapter, init_lora_weights=True, layer_replication=[[0, 1]])
    with pytest.raises(InvalidRequestError, match="layer_replication"):
        merged_weights(base, adapter)
    change_config(adapter, layer_replication=None)
    with pytest.raises(InvalidRequestError, match="has no weight"):
        merged_weights(bases("gpt2"), adapter)
    wider = make_model(tmp_path / "wider", hidden_size=128)
    with pytest.raises(InvalidRequestError, match="is not the model"):
        merged_weights(wider, adapter)
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(InvalidRequestError, match="full-precision"):
        merged_weights(wider, adapter)


def test_a_file_that_is_cut_off_is_named(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = make_variant(tmp_path / "adapter", bases("llama"), KINDS["lora"])
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelNotFoundError, match=r"adapter_model\.safetensors is cut off"):
        merged_weights(bases("llama"), adapter)
