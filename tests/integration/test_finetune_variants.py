"""Kinds of adapters and of frozen bases: each trains, and what is on disk says what the run measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from sage.tools.finetune import LoRATrainer, StepMetrics, TrainingCallback, TrainingConfig, TrainResult
from sage.tools.finetune.data import Conversation
from sage.tools.finetune.loss_choice import choose_loss
from sage.tools.finetune.losses import AutocastLoss, PackedLoss, PlainLoss
from sage.tools.finetune.merging.merge import merge_adapter
from sage.tools.finetune.modeling import bitsandbytes_for, load_base
from sage.tools.finetune.rendering import ChatRenderer, Sample
from sage.tools.finetune.task_data import prepare
from sage_contracts.errors import InvalidRequestError, TrainingFailedError


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variants") / "rows.json"
    rows = [{"question": f"Number {n}?", "answer": "The answer is always the same."} for n in range(24)]
    path.write_text(json.dumps(rows))
    return path


def settings(base: Path, rows_file: Path, output: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(rows_file),
        "output_dir": str(output),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-2,
        "precision": "fp32",
        "max_length": 128,
    }
    return TrainingConfig.model_validate({**fields, **changes})


def reloaded_loss(
    base: Path, config: TrainingConfig, result: TrainResult, rows: Sequence[Conversation] | None = None
) -> float:
    """The held-out loss of what is on disk, as plain peft loads it onto the base that a config asks for."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    model = load_base(base, config, "cpu", "fp32")
    tuned = PeftModel.from_pretrained(model, str(result.adapter_dir)).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.adapter_dir)
    held = ChatRenderer(tokenizer, config.max_length).samples(rows or prepare(config).validation)
    with torch.no_grad():
        return float(PlainLoss(tuned)(held).item() / sum(sample.label_count for sample in held))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"use_rslora": True, "r": 16}},
        {"lora": {"use_dora": True}},
        {"lora": {"loraplus_lr_ratio": 4}},
        {"lora": {"target_modules": "all-linear"}},
        {"lora": {"target_modules": ["gate_proj", "down_proj"]}},
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        {"load_in_4bit": True, "lora": {"use_dora": True}},
    ],
    ids=json.dumps,
)
def test_every_variant_learns_and_loads_as_it_was_measured(
    tiny_base: Path, rows_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(tiny_base, rows_file, tmp_path, **changes)
    result = LoRATrainer(config, ()).train()
    assert result.eval_loss is not None and result.base_eval_loss is not None
    assert result.eval_loss < result.base_eval_loss - 0.1
    # Layers in 8 bit round by what else goes through them, and a row alone has its last label with it.
    noise = 1e-3 if config.load_in_8bit else 1e-4
    assert reloaded_loss(tiny_base, config, result) == pytest.approx(result.eval_loss, rel=noise)
    # What was learnt on a quantised base helps a plain one too, which it is served with.
    plain = config.model_copy(update={"load_in_8bit": False, "load_in_4bit": False})
    assert reloaded_loss(tiny_base, plain, result) < result.base_eval_loss - 0.1


_ONE_AFTER_THE_OTHER = """
import sys
from sage.tools.finetune import LoRATrainer, TrainingConfig
plain, quantised = (TrainingConfig.model_validate_json(argument) for argument in sys.argv[1:])
LoRATrainer(plain, ()).train()
assert "bitsandbytes" not in sys.modules, "imported for nothing"
print(LoRATrainer(quantised, ()).train().eval_loss)
"""


def test_bitsandbytes_is_imported_for_quantised_bases_only(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    plain = settings(tiny_base, rows_file, tmp_path / "plain")
    quantised = settings(tiny_base, rows_file, tmp_path / "quantised", load_in_4bit=True)
    arguments = [config.model_dump_json() for config in (plain, quantised)]
    found = subprocess.run(
        [sys.executable, "-c", _ONE_AFTER_THE_OTHER, *arguments], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    alone = LoRATrainer(quantised.model_copy(update={"output_dir": str(tmp_path / "alone")}), ()).train()
    assert float(found.stdout) == pytest.approx(alone.eval_loss, rel=1e-4)


def test_bitsandbytes_can_be_had_after_peft_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setitem(sys.modules, "peft.import_utils", None)  # as where peft is broken
    with pytest.raises(ImportError), bitsandbytes_for(is_quantised=False):
        raise AssertionError("nothing was wrong with peft")
    assert "bitsandbytes" not in sys.modules


def test_8_bit_dora_on_a_cpu_is_refused_with_a_way_out(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, rows_file, tmp_path, load_in_8bit=True, lora={"use_dora": True})
    with pytest.raises(InvalidRequestError, match="Set load_in_4bit instead"):
        LoRATrainer(config, ()).train()


def test_target_modules_decide_which_layers_get_adapters(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    def trained(name: str, targets: Any) -> set[str]:
        config = settings(
            tiny_base, rows_file, tmp_path / name, max_steps=1, lora={"target_modules": targets}
        )
        result = LoRATrainer(config, ()).train()
        assert result.adapter_dir is not None
        return {key.split(".")[-3] for key in load_file(result.adapter_dir / "adapter_model.safetensors")}

    assert trained("named", ["gate_proj", "down_proj"]) == {"gate_proj", "down_proj"}
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert trained("all", "all-linear") == attention | mlp


def test_lora_plus_keeps_its_ratio_through_the_schedule(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Adam's first update moves every weight by the learning rate: B's, while A has no gradient yet."""
    from safetensors.torch import load_file

    def largest_b(name: str, **lora: Any) -> float:
        # Five warm-up steps: the first one runs at a fifth of the rate.
        config = settings(
            tiny_base, rows_file, tmp_path / name, max_steps=5, warmup_ratio=0.99, save_steps=1,
            save_total_limit=9, learning_rate=1e-3, validation_fraction=0, max_grad_norm=0, lora=lora,
        )  # fmt: skip
        LoRATrainer(config, ()).train()
        weights = load_file(tmp_path / name / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")
        return max(float(weight.abs().max()) for key, weight in weights.items() if "lora_B" in key)

    assert largest_b("plain") == pytest.approx(1e-3 / 5, rel=0.01)
    assert largest_b("plus", loraplus_lr_ratio=16) == pytest.approx(16e-3 / 5, rel=0.01)


def test_full_tuning_trains_every_weight_and_leaves_a_plain_model(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    LoRATrainer(settings(tiny_base, rows_file, tmp_path, max_steps=1), ()).train()
    config = settings(tiny_base, rows_file, tmp_path, tuning="full", learning_rate=1e-3, save_steps=4)
    result = LoRATrainer(config, ()).train()
    assert result.eval_loss is not None and result.base_eval_loss is not None
    assert result.eval_loss < result.base_eval_loss - 0.5
    assert (result.adapter_dir, result.model_dir) == (None, tmp_path / "full_model")
    assert not (tmp_path / "lora_weights").exists(), "the older result is not the newest"

    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert model.config.use_cache and model.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    moved = zip(model.parameters(), base.parameters(), strict=True)
    assert all(not torch.equal(after, before) for after, before in moved)
    held = ChatRenderer(AutoTokenizer.from_pretrained(result.model_dir), 128).samples(
        prepare(config).validation
    )
    with torch.no_grad():
        loss = PlainLoss(model.eval())(held).item() / sum(sample.label_count for sample in held)
    assert loss == pytest.approx(result.eval_loss, rel=1e-5)
    assert 'library_name: "transformers"' in (result.model_dir / "README.md").read_text()


def test_full_tuning_resumes_and_rolls_back_too(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def run(name: str, steps: int, **changes: Any) -> Any:
        fields = {"tuning": "full", "learning_rate": 1e-3, "save_steps": 1, **changes}
        config = settings(tiny_base, rows_file, tmp_path / name, **fields)
        watcher = StopAfter(steps)
        return LoRATrainer(config, [watcher], resume=True, run_id="one").train()

    whole = run("whole", 99)
    assert run("halves", 3).model_dir is None
    resumed = run("halves", 99)
    expected = load_file(whole.model_dir / "model.safetensors")
    for name, found in load_file(resumed.model_dir / "model.safetensors").items():
        assert (found - expected[name]).abs().max() < 1e-6

    # Back at the start it is the base again: its first loss is the same.
    config = settings(
        tiny_base, rows_file, tmp_path / "wild", tuning="full", learning_rate=1e20, max_rollbacks=1
    )
    watcher = StopAfter(99)
    with pytest.raises(TrainingFailedError, match="also after going back once"):
        LoRATrainer(config, [watcher]).train()
    assert watcher.losses[0] == watcher.losses[1]


@pytest.fixture(scope="module")
def phi3_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries, keys and values come out of one layer, `qkv_proj`."""
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    tokenizer, folder = AutoTokenizer.from_pretrained(tiny_base), tmp_path_factory.mktemp("phi3") / "base"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = Phi3Config(vocab_size=len(tokenizer), max_position_embeddings=512, **shape, **special)
    Phi3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("targets", "adapted", "warned"),
    [
        (None, {"qkv_proj", "o_proj"}, ""),
        (
            ["q_proj", "v_proj", "o_proj"],
            {"o_proj"},
            "no layer called q_proj, v_proj, so the adapters are on o_proj",
        ),
        (["o_proj", "qkv_proj"], {"o_proj", "qkv_proj"}, ""),
        ("all-linear", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, ""),
    ],
)
def test_targets_that_a_model_has_in_one_layer_or_not_at_all(
    phi3_base: Path, rows_file: Path, tmp_path: Path, targets: Any, adapted: set[str], warned: str
) -> None:
    from tests.integration.finetune_recorder import Recorder, adapter_weights

    lora = {} if targets is None else {"target_modules": targets}
    watcher = Recorder()
    config = settings(phi3_base, rows_file, tmp_path / "out", max_steps=2, lora=lora)
    result = LoRATrainer(config, [watcher]).train()

    assert {key.split(".")[-3] for key in adapter_weights(result)} == adapted
    warnings = [
        message for level, message in watcher.logs if level == "warn" and "no layer called" in message
    ]
    assert len(warnings) == bool(warned) and all(warned in message for message in warnings)
    assert reloaded_loss(phi3_base, config, result) == pytest.approx(result.eval_loss, rel=1e-4)
    merged = merge_adapter(phi3_base, result.adapter_dir, tmp_path / "merged")
    assert merged.parity.same == merged.parity.probes


class StopAfter(TrainingCallback):
    def __init__(self, steps: int) -> None:
        self.losses: list[float] = []
        self._left = steps

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)
        self._left -= 1

    def should_stop(self) -> Literal["save_and_stop"] | None:
        return None if self._left > 0 else "save_and_stop"


def test_half_precision_over_full_weights_is_near_to_fp32(tiny_base: Path) -> None:
    import torch

    config = TrainingConfig(tuning="full")
    model = load_base(tiny_base, config, "cpu", "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.randint(2, 250, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [Sample(ids, [-100] * 8 + ids[8:])]
    exact = PackedLoss(model)
    half = AutocastLoss(exact, "cpu", torch.bfloat16)
    assert exact(rows).item() != half(rows).item() == pytest.approx(exact(rows).item(), rel=0.05)
    half(rows).backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
    )


def test_half_precision_over_full_weights_meets_few_sizes_on_a_cpu(tiny_base: Path) -> None:
    """oneDNN keeps a kernel for each size of what it multiplies in half precision."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    attended: set[torch.dtype] = set()
    sizes: set[int] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if "scaled_dot_product" in name:
                attended.add(args[0].dtype)
            elif "mm" in name and args[0].dtype == torch.bfloat16:
                sizes.update(size for part in args[:2] for size in part.shape)
            return func(*args, **(kwargs or {}))

    model = load_base(tiny_base, TrainingConfig(tuning="full"), "cpu", "bf16")
    ids = torch.randint(2, 250, (45,), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [Sample(ids[:length], [-100] * 3 + ids[3:length]) for length in (40, 45, 17)]
    said: list[str] = []
    with torch.autocast("cpu", torch.bfloat16):
        loss = choose_loss(model, rows, said.append)
    assert (loss.name, said) == ("packed", [])
    half = AutocastLoss(loss, "cpu", torch.bfloat16)
    with Seen():
        half(rows).backward()
        half(rows[:1]).backward()
    assert attended == {torch.float32}
    of_the_model = {size for parameter in model.parameters() for size in parameter.shape}
    assert sizes
    assert all(size % 64 == 0 for size in sizes - of_the_model), sizes
