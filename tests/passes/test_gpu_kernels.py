"""The kernels of a GPU against the same layers in float32 on the CPU. Skipped without CUDA."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from olive.passes.finetune import attention, fused
from olive.passes.finetune.base_weights import QuantisedLinear
from olive.quantization.blockwise import Scheme, dequantise, quantise
from tiny import tiny_phi3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = 4e-3  # of the norm: a rounding to bfloat16 is 2^-9 of each number


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance."""
    return float((got.float().cpu() - wanted.cpu()).norm() / wanted.cpu().norm().clamp(min=1e-9))


def check(layer: Any, *inputs: torch.Tensor) -> None:
    """Values and gradients of ``layer`` in bfloat16 on the GPU and in float32 on the CPU."""
    torch.manual_seed(1)
    gpu = [x.to("cuda", torch.bfloat16).requires_grad_() for x in inputs]
    cpu = [x.detach().float().cpu().requires_grad_() for x in gpu]
    found, wanted = layer(*gpu), layer(*cpu)
    found, wanted = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
    grads = [torch.randn(x.shape, device="cuda", dtype=torch.bfloat16) for x in found]
    into = torch.autograd.grad(found, gpu, grads)
    expected = torch.autograd.grad(wanted, cpu, [grad.float().cpu() for grad in grads])
    for got, right in zip((*found, *into), (*wanted, *expected), strict=True):
        assert off(got.detach(), right.detach()) < TOLERANCE


@pytest.mark.parametrize("size", [576, 3072, 4096])
def test_norm(size: int) -> None:
    weight = torch.rand(size).bfloat16()
    check(
        lambda x: fused.RMSNormFrozen.apply(x, weight.cuda() if x.is_cuda else weight.float(), 1e-5),
        torch.randn(2, 130, size),
    )


@pytest.mark.parametrize("size", [1536, 8192])
def test_swiglu(size: int) -> None:
    check(fused.SwiGLU.apply, torch.randn(130, 2 * size))
    check(fused.GatedSiLU.apply, torch.randn(130, size), torch.randn(130, size))


@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(9, 3, 64), (32, 32, 96), (32, 8, 128)])
def test_rotation(heads: int, key_heads: int, dim: int) -> None:
    angles = torch.rand(130, dim // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def layer(qkv: torch.Tensor) -> Any:
        tables = (cos.cuda(), sin.cuda()) if qkv.is_cuda else (cos.float(), sin.float())
        return fused.SplitRotate.apply(qkv, *tables, heads, key_heads)

    check(layer, torch.randn(130, (heads + 2 * key_heads) * dim))


@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("lengths", [(300, 17, 1000, 64), (512, 512), (700,)])
@pytest.mark.parametrize("window", [None, 100])
def test_attention(
    heads: int, key_heads: int, dim: int, lengths: tuple[int, ...], window: int | None
) -> None:
    tokens = sum(lengths)
    check(
        lambda q, k, v: attention.attend(q, k, v, lengths, scale=None, window=window),
        torch.randn(tokens, heads, dim),
        torch.randn(tokens, key_heads, dim),
        torch.randn(tokens, key_heads, dim),
    )


@pytest.mark.parametrize(
    "scheme", [Scheme("nf4"), Scheme("nf4", 128, False), Scheme("fp4"), Scheme("int8", 64, False)]
)
@pytest.mark.parametrize("shape", [(96, 576), (33, 64), (7, 130)])
def test_weights_are_the_same_bits_on_both_devices(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02
    wanted = dequantise(quantise(weight, scheme), torch.bfloat16)
    layer = QuantisedLinear(quantise(weight.cuda(), scheme), None, torch.bfloat16)
    if scheme.kind == "int8":  # a division on the GPU may round a scale the other way
        assert off(layer.dense(), wanted.float()) < TOLERANCE
    else:
        assert torch.equal(layer.dense().cpu(), wanted)
    moved = QuantisedLinear(quantise(weight, scheme), None, torch.bfloat16).cuda()
    assert torch.equal(moved.dense().cpu(), wanted)


def test_low_rank_gradients_are_summed_in_float32() -> None:
    a, b = torch.randn(8, 576, requires_grad=True), torch.randn(960, 8, requires_grad=True)
    weight, x = torch.randn(960, 576).bfloat16(), torch.randn(700, 576).bfloat16()
    grad = torch.randn(700, 960).bfloat16()
    found = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        pair = [p.detach().to(device).requires_grad_() for p in (a, b)]
        given = x.to(device, dtype).requires_grad_()
        kept = weight.to(device, dtype)
        out = fused.LoraLinear.apply(
            given,
            lambda kept=kept: kept,
            None,
            *pair,
            fused.Factors(*(SimpleNamespace(weight=w) for w in pair)),
            None,
            0.5,
        )
        into = torch.autograd.grad(out, [given, *pair], grad.to(device, dtype))
        assert into[1].dtype == into[2].dtype == torch.float32
        found.append([out.detach(), *into])
    for got, wanted in zip(*found, strict=True):
        assert off(got, wanted) < 2 * TOLERANCE


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_layer_computed_twice_gives_the_gradients_of_one_that_is_not(tmp_path: Path, drop: float) -> None:
    from peft import LoraConfig, get_peft_model

    from olive.models.hf import load_model
    from olive.passes.finetune import decoder, patch

    base = load_model(
        tiny_phi3(tmp_path / "base"), dtype="bfloat16", attn_implementation=attention.register()
    )
    torch.manual_seed(0)
    model = get_peft_model(
        base.to("cuda"),
        LoraConfig(r=4, lora_dropout=drop, target_modules="all-linear", init_lora_weights=False),
    ).train()
    assert patch.patch(model)["decoder"] == 2
    ids = torch.randint(5, 200, (1, 90), device="cuda")
    places = torch.cat([torch.arange(40), torch.arange(50)])[None].cuda()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(7)
        out = model(input_ids=ids, position_ids=places, document_lengths=(40, 50), use_cache=False).logits
        out.float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    patch.compute_twice(model)
    twice = gradients()
    patch.compute_twice(model, offload=True)
    causal = model.get_base_model()
    table = causal.get_input_embeddings().weight.clone()
    causal.set_input_embeddings(decoder.HostEmbedding(table, table.device))
    waiting = gradients()
    # the same masks, drawn from the layer's own seed
    assert all(torch.equal(a, b) for a, b in zip(twice, waiting, strict=True))
    if not drop:
        assert all(off(a, b.cpu()) < TOLERANCE for a, b in zip(twice, plain, strict=True))
