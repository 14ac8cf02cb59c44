"""One matrix for every way of fine-tuning: trains, is merged, passes the gate, and says what PEFT says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import adapter_kit
from olive.config.gates import MergeGate
from olive.engine.gates import merge as gate
from olive.errors import PassFailed
from olive.models import seen
from olive.models.adapter import load_adapter
from olive.models.artifact import Artifact, Kind
from olive.models.hf import describe, load_model
from olive.passes.adapters.merge import MergeAdapterWeights
from olive.passes.base import PassContext
from olive.passes.finetune.base_weights import QuantisedLinear
from olive.passes.registry import resolve
from tiny import tiny_llama, tiny_phi3
from training_kit import context, data, rows

PROMPT = [5, 9, 40, 77, 200, 31, 8, 150]
# products of small numbers: their gradients are small at first
FASTER = {"max_steps": 12, "gradient_accumulation_steps": 4, "learning_rate": 3e-2, "seed": 0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoRA", {}),
    "rslora": ("LoRA", {"use_rslora": True}),
    "pissa": ("LoRA", {"init_lora_weights": "pissa"}),
    "olora-rslora": ("LoRA", {"init_lora_weights": "olora", "use_rslora": True}),
    "dora": ("DoRA", {}),
    "loha": ("LoHa", {"training_args": FASTER}),
    "lokr": ("LoKr", {}),
    "lokr-both": ("LoKr", {"decompose_both": True, "decompose_factor": 8, "r": 2, "training_args": FASTER}),
    "qlora-nf4": ("QLoRA", {"double_quant": True}),
    "qlora-fp4": ("QLoRA", {"quant_type": "fp4"}),
    "qlora-int8": ("QLoRA", {"quant_type": "int8"}),
    "loftq": ("LoftQ", {"loftq_iter": 2}),
}


def settings(name: str, **changes: Any) -> tuple[Any, Any]:
    """The pass and its parameters."""
    kind, own = METHODS[name]
    technique = resolve(kind)
    given = {
        "r": 4,
        "alpha": 8,
        "train_data_config": "train",
        "torch_dtype": "float32",
        "target_modules": "all-linear",
        "training_args": {"max_steps": 4, "gradient_accumulation_steps": 4, "learning_rate": 5e-3, "seed": 0},
    }
    if "lora_dropout" in technique.Params.model_fields:
        given["lora_dropout"] = 0.0
    return technique(), technique.Params.model_validate(given | own | changes)


def train(base: Path, folder: Path, name: str, given: Artifact | None = None, **changes: Any) -> PassContext:
    folder.mkdir(exist_ok=True)
    technique, params = settings(name, **changes)
    ctx = context(folder, data(rows(folder)))
    technique.run(given or Artifact(kind=Kind.HF, path=base, digest="b" * 64), params, ctx)
    technique.ensure(ctx.out)
    return ctx


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    ctx = adapter_kit.context(folder)
    MergeAdapterWeights().run(adapter_kit.artifact(base, adapter), MergeAdapterWeights.Params(), ctx)
    return ctx.out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0]
    return found


@pytest.mark.parametrize("name", METHODS)
def test_trains_merges_and_passes_the_gate(tmp_path: Path, name: str) -> None:
    base = tiny_phi3(tmp_path / "base")
    ctx = train(base, tmp_path / "train", name)
    losses = [point["loss"] for point in ctx.series["loss"]]
    assert losses[-1] < losses[0]
    out = merged(base, ctx.out, tmp_path / "merge")
    artifact = adapter_kit.artifact(base, ctx.out)
    result = gate.check(artifact, out, MergeGate(), adapter_kit.context(tmp_path / "gate"), [PROMPT])
    assert result.figures["kl"] < 1e-6
    technique, params = settings(name)
    info = describe(base)
    assert technique.trained_parameters(info, params) == ctx.facts["trainable_parameters"]


@pytest.mark.parametrize("name", ["qlora-nf4", "qlora-fp4", "loftq"])
def test_the_merge_is_what_bitsandbytes_and_peft_compute(tmp_path: Path, name: str) -> None:
    """Nothing of ours in the reference: bitsandbytes rounds, PEFT adds."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from peft import PeftModel

    base = tiny_phi3(tmp_path / "base")
    ctx = train(base, tmp_path / "train", name)
    told = seen.read(ctx.out)
    assert told is not None
    reference = load_model(base, dtype="float32")
    for module in told.modules:
        layer = reference.get_submodule(module)
        weight = layer.weight.data
        if module in told.initial:
            a, b = told.initial[module]
            weight = weight - b @ a
        codes, state = functional.quantize_4bit(
            weight, quant_type=told.kind, blocksize=told.block, compress_statistics=told.double
        )
        layer.weight.data = functional.dequantize_4bit(codes, state)
    wanted = logits(PeftModel.from_pretrained(reference, ctx.out)).log_softmax(-1)
    got = logits(load_model(merged(base, ctx.out, tmp_path / "merge"), dtype="float32")).log_softmax(-1)
    # scales of the scales: one step in 256 at one block in a hundred
    near = float((wanted.exp() * (wanted - got)).sum(-1).max())
    assert near < 1e-4
    plain = logits(load_model(base, dtype="float32")).log_softmax(-1)
    assert float((wanted.exp() * (wanted - plain)).sum(-1).max()) > 10 * near


def test_merging_into_the_unrounded_base_is_caught(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    ctx = train(base, tmp_path / "train", "qlora-nf4")
    forgetful = tmp_path / "forgetful"
    forgetful.mkdir()
    for path in ctx.out.glob("adapter_*"):
        (forgetful / path.name).write_bytes(path.read_bytes())
    out = merged(base, forgetful, tmp_path / "merge")
    with pytest.raises(PassFailed, match="not scale times B A"):
        gate.check(
            adapter_kit.artifact(base, ctx.out),
            out,
            MergeGate(),
            adapter_kit.context(tmp_path / "g"),
            [PROMPT],
        )


@pytest.mark.parametrize("name", ["qlora-nf4", "qlora-int8", "loftq"])
def test_codes_and_expanded_weights_train_alike(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base")
    kept = train(base, tmp_path / "kept", name)
    assert kept.facts["base"].endswith("expanded once")
    monkeypatch.setattr("olive.passes.finetune.base_weights._HEADROOM", 0.0)
    packed = train(base, tmp_path / "packed", name)
    assert packed.facts["base"].endswith("expanded in each product")
    assert packed.facts["fused_layers"]["lora"] == kept.facts["fused_layers"]["lora"] > 0
    wanted = [point["loss"] for point in kept.series["loss"]]
    assert [point["loss"] for point in packed.series["loss"]] == pytest.approx(wanted, abs=1e-6)


def test_a_quantised_layer_holds_codes_and_keeps_its_scales() -> None:
    from olive.quantization.blockwise import Scheme, dequantise, quantise

    weight = torch.randn(24, 64)
    value = quantise(weight, Scheme())
    layer = QuantisedLinear(value, torch.ones(24), torch.float32)
    assert layer.weight.nbytes == 24 * 64 // 2
    x = torch.randn(3, 64)
    assert torch.allclose(layer(x), x @ dequantise(value).T + 1, atol=1e-5)
    half = layer.to(torch.bfloat16)
    assert half.value.outer.dtype == torch.float32
    assert torch.equal(half.dense(), dequantise(value))


def test_full_finetuning_gives_a_whole_model(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    technique = resolve("FullFinetune")
    arguments = {"max_steps": 3, "gradient_accumulation_steps": 4, "learning_rate": 1e-3, "seed": 0}
    for targets, expected in ((None, describe(base).parameters), (("o_proj",), 2 * 64 * 64)):
        folder = tmp_path / f"train-{targets}"
        ctx = context(folder, data(rows(tmp_path)))
        params = technique.Params.model_validate(
            {"train_data_config": "train", "target_modules": targets, "training_args": arguments}
        )
        technique().run(Artifact(kind=Kind.HF, path=base, digest="b" * 64), params, ctx)
        technique().ensure(ctx.out)
        before, after = (load_model(folder, dtype="float32").state_dict() for folder in (base, ctx.out))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        if targets is None:
            assert changed == set(before)
        else:
            assert changed == {name for name in before if "o_proj" in name}
        losses = [point["loss"] for point in ctx.series["loss"]]
        assert losses[-1] < losses[0]
        assert (ctx.out / "tokenizer.json").exists()
        assert ctx.facts["trainable_parameters"] == expected


def test_goes_on_from_an_adapter(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    first = train(base, tmp_path / "first", "lora")
    given = adapter_kit.artifact(base, first.out)
    second = train(base, tmp_path / "second", "lora", given)
    assert second.series["loss"][0]["loss"] < first.series["loss"][0]["loss"]
    model = load_adapter(base, second.out, "float32")
    assert any("lora_B" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("first", ["qlora-nf4", "loftq"])
@pytest.mark.parametrize("then", ["lora", "qlora-int8"])
def test_goes_on_from_the_base_that_the_adapter_saw(tmp_path: Path, first: str, then: str) -> None:
    base = tiny_phi3(tmp_path / "base")
    before = train(base, tmp_path / "first", first)
    after = train(base, tmp_path / "then", then, adapter_kit.artifact(base, before.out))
    told, kept = seen.read(before.out), seen.read(after.out)
    assert told is not None
    assert kept is not None
    assert (told.kind, told.modules, set(told.initial)) == (kept.kind, kept.modules, set(kept.initial))
    out = merged(base, after.out, tmp_path / "merge")
    artifact = adapter_kit.artifact(base, after.out)
    gate.check(artifact, out, MergeGate(), adapter_kit.context(tmp_path / "gate"), [PROMPT])


@pytest.mark.parametrize(
    ("targets", "layers", "wanted"),
    [
        (r".*layers\.1\..*o_proj", None, {"model.layers.1.self_attn.o_proj"}),
        (("o_proj",), (0,), {"model.layers.0.self_attn.o_proj"}),
        (("self_attn.o_proj",), None, {f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)}),
    ],
)
def test_targets_by_expression_and_layer(
    tmp_path: Path, targets: Any, layers: tuple[int, ...] | None, wanted: set[str]
) -> None:
    base = tiny_phi3(tmp_path / "base")
    ctx = train(base, tmp_path / "train", "lora", target_modules=targets, layers_to_transform=layers)
    names = json.dumps(sorted(describe(ctx.out).tensors))
    assert {module for module in wanted if module in names} == wanted
    technique, params = settings("lora", target_modules=targets, layers_to_transform=layers)
    assert technique.trained_parameters(describe(base), params) == ctx.facts["trainable_parameters"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_modules": "(o_proj"}, "no regular expression"),
        ({"target_modules": r"layers\.9\..*"}, "no linear layer's whole name"),
        ({"target_modules": ("o_porj",)}, "no module 'o_porj'"),
        ({"layers_to_transform": (1, 7)}, "no layer 7"),
    ],
)
def test_targets_that_do_not_exist_are_found_in_the_plan(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    from olive.config.workflow import Accelerator
    from olive.hardware.probe import probe

    technique, params = settings("lora", **changes)
    found = technique.check(describe(tiny_phi3(tmp_path / "base")), params, probe(), Accelerator())
    assert any(says in problem.message and problem.fix for problem in found)
