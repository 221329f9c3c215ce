"""GGUF files, read back by transformers' own reader, say what the adapter says, or are not kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from tests.fakes.tiny_llama import make_adapter, make_model

from sage.tools.finetune import LoRATrainer
from sage.tools.finetune.exporting.export import ExportWish, export_model
from sage.tools.finetune.exporting.ollama import chat_turns
from sage.tools.finetune.gguf_import import convert_gguf
from sage.tools.finetune.merging.tensor_files import stored_tensors
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidRequestError, TrainingFailedError

# transformers' GGUF reader hands numpy's read-only memory to torch.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "lora_weights", tiny_base)


def make_qwen2(folder: Path, like: Path) -> Path:
    """Biases on q, k and v, tied embeddings, and the tokenizer of the other."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(like)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
        **shape,
        **special,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("numbers", ["f16", "q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_gguf_file_says_what_the_adapter_says(
    tiny_base: Path, adapter: Path, tmp_path: Path, architecture: str, numbers: Any
) -> None:
    base = tiny_base
    if architecture == "qwen2":
        base = make_qwen2(tmp_path / "qwen2", tiny_base)
        adapter = make_adapter(tmp_path / "adapter", base)
    out = tmp_path / "exports" / "gguf"

    found = export_model(base, adapter, out, ExportWish(f"gguf-{numbers}", "code-1"))

    assert found.parity is not None
    assert found.parity.top1 > 0.8
    assert found.parity.mean_kl < 0.1 * found.parity.base_kl
    assert found.path == out / f"code-1-{numbers}.gguf"
    assert {path.name for path in out.iterdir()} == {found.path.name, "Modelfile", "sage_export.json"}
    assert "TEMPLATE" in (out / "Modelfile").read_text()
    assert '\nPARAMETER stop "<|im_end|>"' in (out / "Modelfile").read_text()
    assert json.loads((out / "sage_export.json").read_text())["parity"]["probes"] == 3


def test_what_is_written_can_be_imported_again(tiny_base: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer

    base = make_model(tmp_path / "base", seed=4)
    rules = Tokenizer.from_file(str(base / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    rules.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    rules.save(str(base / "tokenizer.json"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["unk_token"] = "<|im_end|>"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    adapter = make_adapter(tmp_path / "adapter", base, rank=2)
    gguf = export_model(base, adapter, tmp_path / "gguf", ExportWish("gguf-f16", "code-1")).path
    again = tmp_path / "again"
    again.mkdir()

    convert_gguf(gguf, again)

    merged = tmp_path / "zip"
    export_model(base, adapter, merged, ExportWish("zip", "code-1", dtype="bf16"))
    with ZipFile(merged / "code-1-merged.zip") as archive:
        archive.extractall(tmp_path)
    left, right = stored_tensors(again), stored_tensors(tmp_path / "code-1")
    assert left.keys() == right.keys()
    for name in left:
        # Rounded to fp16 and from there to bf16, or to bf16 at once.
        assert abs(left[name].read() - right[name].read()).max() <= 2**-7 * abs(right[name].read()).max()
    text = "x = 1234  # naïve 你好\n"
    assert AutoTokenizer.from_pretrained(again)(text) == AutoTokenizer.from_pretrained(base)(text)


def test_llama_3s_positions_are_scaled_as_transformers_scales_them(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    base = make_model(tmp_path / "base", rope_parameters=rope)
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    from sage.tools.finetune.exporting.gguf_model import write_gguf
    from sage.tools.finetune.merging.weights import merged_weights

    adapter = make_adapter(tmp_path / "adapter", base)
    write_gguf(merged_weights(base, adapter), base, tmp_path / "x.gguf", "f16", name="x")

    written = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    factors = written["rope_freqs.weight"].data
    scaled = AutoModelForCausalLM.from_pretrained(base).model.rotary_emb.inv_freq.numpy()
    plain = 10_000.0 ** -(2 * __import__("numpy").arange(16) / 32)
    assert abs(plain / factors - scaled).max() < 1e-6 < abs(plain - scaled).max()


def test_a_file_that_went_bad_is_not_kept(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    def damage(phase: str) -> None:
        if phase == "asking the tuned model":
            (file,) = tmp_path.glob(".gguf.*/*.gguf")
            from gguf import GGUFReader

            tensor = next(t for t in GGUFReader(file).tensors if t.name == "blk.1.attn_v.weight")
            with file.open("r+b") as stream:
                stream.seek(tensor.data_offset)
                stream.write(bytes(tensor.n_bytes))

    with pytest.raises(TrainingFailedError, match="not kept"):
        export_model(tiny_base, adapter, tmp_path / "gguf", ExportWish("gguf-q8_0", "code-1"), damage)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_zipped_as_it_is(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    found = export_model(tiny_base, adapter, tmp_path / "zip", ExportWish("zip", "code-1", content="adapter"))
    assert found.parity is None
    with ZipFile(found.path) as archive:
        assert "code-1/adapter_model.safetensors" in archive.namelist()


def test_a_merged_model_carries_its_settings_its_figures_and_a_card_of_its_own(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n} and one?", "completion": f"{n + 1}."} for n in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = TrainingConfig(
        model_name=str(tiny_base), data_path=str(data), max_steps=1, output_dir=str(tmp_path / "code")
    )
    result = LoRATrainer(config, ()).train()
    found = export_model(tiny_base, result.adapter_dir, tmp_path / "zip", ExportWish("zip", "code-1"))
    with ZipFile(found.path) as archive:
        archive.extractall(tmp_path)
    packed = tmp_path / "code-1"
    card = (packed / "README.md").read_text()
    assert "merged into" in card
    assert 'AutoModelForCausalLM.from_pretrained(".")' in card
    assert json.loads((packed / "training_config.json").read_text())["max_steps"] == 1
    assert json.loads((packed / "finetune_meta.json").read_text())["train_rows"] > 0
    merge = json.loads((packed / "sage_merge.json").read_text())
    assert (merge["base"], merge["parity"]["probes"]) == (tiny_base.name, 3)


@pytest.mark.parametrize(
    ("name", "info", "known", "revision"),
    [
        (
            "smollm2-135m",
            {"source": "pypi:x", "revision": "sha256:1", "upstream": "org/built"},
            "org/built",
            None,
        ),
        ("org/tiny", {"source": "hub:org/tiny", "revision": "abc"}, "org/tiny", "abc"),
        ("base_models/org--tiny", {"source": "hub:org/tiny", "revision": "abc"}, "org/tiny", "abc"),
        ("org/by-hand", None, "org/by-hand", None),
        ("base_models/mine", None, None, None),
    ],
)
def test_an_adapter_names_its_base_as_others_find_it(
    tiny_base: Path, tmp_path: Path, name: str, info: Any, known: str | None, revision: str | None
) -> None:
    home = tmp_path / "home"
    folder = home / "base_models" / name.removeprefix("base_models/").replace("/", "--")
    shutil.copytree(tiny_base, folder)
    if info:
        (folder / "sage_base.json").write_text(json.dumps(info))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}."}) for n in range(8)))
    config = TrainingConfig(
        model_name=name, data_path=str(data), max_steps=1, save_steps=1, output_dir=str(tmp_path / "code")
    )
    result = LoRATrainer(config, (), home=home).train()
    assert result.adapter_dir is not None

    for written in (result.adapter_dir, tmp_path / "code/checkpoints/checkpoint-1"):
        adapters = json.loads((written / "adapter_config.json").read_text())
        assert adapters["base_model_name_or_path"] == (known or str(folder))
        assert adapters["revision"] == revision
    # As versions of before are.
    adapters |= {"base_model_name_or_path": str(folder), "revision": None}
    (result.adapter_dir / "adapter_config.json").write_text(json.dumps(adapters))
    found = export_model(
        folder, result.adapter_dir, tmp_path / "zip", ExportWish("zip", "c", content="adapter")
    )
    with ZipFile(found.path) as archive:
        texts = {entry: archive.read(entry).decode(errors="replace") for entry in archive.namelist()}
    exported = json.loads(texts["c/adapter_config.json"])
    assert (exported["base_model_name_or_path"], exported["revision"]) == (known or str(folder), revision)
    if known:
        assert f'base_model: "{known}"' in texts["c/README.md"]
        assert [entry for entry, text in texts.items() if str(tmp_path) in text] == []


def test_templates_beside_the_default_one_go_wherever_the_tokenizer_goes(tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    base = make_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    templates = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}" + tokenizer.chat_template}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(base)
    adapter = make_adapter(tmp_path / "adapter", base)

    export_model(base, adapter, tmp_path / "zip", ExportWish("zip", "code-1"))
    gguf = export_model(base, adapter, tmp_path / "gguf", ExportWish("gguf-f16", "code-1")).path

    with ZipFile(tmp_path / "zip" / "code-1-merged.zip") as archive:
        archive.extractall(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "code-1").chat_template == templates
    fields = GGUFReader(gguf).fields
    assert fields["tokenizer.chat_template"].contents() == templates["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == templates["tool_use"]
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
    assert {path.name for path in gguf.parent.iterdir()} == {gguf.name, "Modelfile", "sage_export.json"}


def test_a_model_that_gguf_is_not_written_for_is_named(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    with pytest.raises(InvalidRequestError, match="gemma"):
        export_model(base, adapter, tmp_path / "out", ExportWish("gguf-f16", "code-1"))
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InvalidRequestError, match="splits text"):
        export_model(base, adapter, tmp_path / "out", ExportWish("gguf-f16", "code-1"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("opening", "is_said"),
    [
        ("Be kind.", True),
        ("{% set at = strftime_now('%Y') %}Be kind.", True),  # asked for, and not told
        ("Today: {{ strftime_now('%d %b %Y') }}", False),
        ("Since {{ strftime_now('%Y') }}", False),
        ("It is {% if strftime_now is defined %}{{ strftime_now('%B') }}{% else %}July{% endif %}", False),
    ],
)
def test_a_template_that_tells_the_date_is_not_frozen_on_the_day_of_the_export(
    tiny_base: Path, tmp_path: Path, opening: str, is_said: bool
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = f"<|im_start|>system\n{opening}<|im_end|>\n{tokenizer.chat_template}"
    tokenizer.save_pretrained(tmp_path)
    turns, stops = chat_turns(tmp_path)
    assert ((turns is not None), stops[-1]) == (is_said, "<|im_end|>")


def test_a_model_tuned_in_full_is_exported_from_its_own_folder(tmp_path: Path) -> None:
    own = make_model(tmp_path / "full_model", context=64)
    (own / "README.md").write_text("what it was tuned on")

    gguf = export_model(own, None, tmp_path / "ollama", ExportWish("ollama", "code-1"))
    packed = export_model(own, None, tmp_path / "zip", ExportWish("zip", "code-1"))

    assert gguf.parity is not None and (gguf.parity.dtype, gguf.parity.base_kl) == ("q8_0", 0)
    assert {path.name for path in gguf.path.iterdir()} == {
        "Modelfile", "code-1-q8_0.gguf", "sage_export.json",
    }  # fmt: skip
    assert packed.parity is not None and packed.parity.same == packed.parity.probes
    with ZipFile(packed.path) as archive:
        archive.extractall(tmp_path)
    assert (tmp_path / "code-1/README.md").read_text() == "what it was tuned on"
    assert json.loads((tmp_path / "code-1/sage_merge.json").read_text())["base"] == "full_model"
    left, right = stored_tensors(own), stored_tensors(tmp_path / "code-1")
    assert left.keys() == right.keys()
    assert all((left[name].read() == right[name].read()).all() for name in left)
    with pytest.raises(InvalidRequestError, match="no adapter"):
        export_model(own, None, tmp_path / "none", ExportWish("zip", "code-1", content="adapter"))
