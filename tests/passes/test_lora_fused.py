"""The fused layers, the packed attention and the loss against plain autograd in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from olive.passes.finetune import attention, cpu_attention, fused, loss

TOLERANCE = 1e-5


def holding(weight: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(weight=weight)


def close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    scale = max(1.0, float(reference.abs().max()))
    assert float((ours.double() - reference.double()).abs().max()) <= TOLERANCE * scale


def both(ours, plain, *inputs: torch.Tensor) -> None:
    """Value and gradients of two functions, the plain one in float64."""
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    theirs = [x.detach().double().requires_grad_() for x in inputs]
    a, b = ours(*mine), plain(*theirs)
    close(a, b)
    weight = torch.linspace(-1, 1, a.numel()).view(a.shape)
    (a * weight).sum().backward()
    (b * weight.double()).sum().backward()
    for x, y in zip(mine, theirs, strict=True):
        close(x.grad, y.grad)


def test_norm_equals_plain() -> None:
    torch.manual_seed(0)
    weight = torch.rand(48) + 0.5
    both(
        lambda x: fused.RMSNormFrozen.apply(x, weight, 1e-5),
        lambda x: weight.double() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
        torch.randn(2, 7, 48),
    )


def test_norm_of_bfloat16_reduces_in_float32() -> None:
    x = torch.randn(3, 64).bfloat16()
    out = fused.RMSNormFrozen.apply(x, torch.ones(64).bfloat16(), 1e-6)
    wide = x.float()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=8e-3, atol=1e-3)


def test_swiglu_equals_plain() -> None:
    torch.manual_seed(1)

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up

    both(fused.SwiGLU.apply, plain, torch.randn(5, 24) * 3)
    both(
        fused.GatedSiLU.apply,
        lambda gate, up: functional.silu(gate) * up,
        torch.randn(5, 12) * 3,
        torch.randn(5, 12),
    )


def test_rotation_equals_plain() -> None:
    torch.manual_seed(2)
    heads, key_heads, dim, tokens = 4, 2, 8, 6
    angles = torch.rand(tokens, dim // 2).repeat(1, 2) * 6
    cos, sin = angles.cos(), angles.sin()

    def plain(qkv: torch.Tensor) -> torch.Tensor:
        parts = qkv.view(tokens, heads + 2 * key_heads, dim)
        x = parts[:, : heads + key_heads]
        turned = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        x = x * cos.double()[:, None] + turned * sin.double()[:, None]
        return torch.cat([x, parts[:, heads + key_heads :]], 1)

    both(
        lambda qkv: torch.cat(fused.SplitRotate.apply(qkv, cos, sin, heads, key_heads), 1),
        plain,
        torch.randn(tokens, (heads + 2 * key_heads) * dim),
    )


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_lora_linear_equals_plain(drop: float) -> None:
    torch.manual_seed(3)
    weight, bias = torch.randn(10, 6), torch.randn(10)
    x = torch.randn(2, 5, 6)
    keep = fused.random_keep(x.view(-1, 6), drop) if drop else None
    grow = 1 / (1 - drop)

    def plain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        dropped = x if keep is None else x * keep.view(x.shape) * grow
        return functional.linear(x, weight.double(), bias.double()) + 0.5 * (dropped @ a.T) @ b.T

    both(
        lambda x, a, b: fused.LoraLinear.apply(
            x, lambda: weight, bias, a, b, fused.Factors(*map(holding, (a, b))), keep, 0.5 * grow
        ),
        plain,
        x,
        torch.randn(3, 6),
        torch.randn(10, 3),
    )


def test_dropout_mask_keeps_the_share_asked_for_and_follows_the_seed() -> None:
    torch.manual_seed(4)
    mask = fused.random_keep(torch.empty(1000, 501), 0.1)
    # standard deviation of the share is 0.0004
    assert abs(1 - mask.float().mean().item() - 0.1) < 0.002
    torch.manual_seed(4)
    assert torch.equal(mask, fused.random_keep(torch.empty(1000, 501), 0.1))


@pytest.mark.parametrize("lengths", [(9,), (4, 4, 4), (5, 1, 60, 7, 58, 100), (100, 3), (2, 90, 80)])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("block", [7, 48, 1000])
def test_attention_stays_inside_documents(
    lengths: tuple[int, ...], window: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "_BLOCK", block)
    torch.manual_seed(5)
    total, heads, key_heads, dim = sum(lengths), 4, 2, 8

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs, start = [], 0
        for length in lengths:
            part = slice(start, start + length)
            start += length
            own_k = k[part].repeat_interleave(heads // key_heads, 1)
            own_v = v[part].repeat_interleave(heads // key_heads, 1)
            scores = torch.einsum("qhd,khd->hqk", q[part], own_k) * 0.2
            far = torch.arange(length)[:, None] - torch.arange(length)[None]
            hidden = (far < 0) if window is None else (far < 0) | (far >= window)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, own_v))
        return torch.cat(outs)

    both(
        lambda q, k, v: attention.attend(q, k, v, lengths, scale=0.2, window=window),
        plain,
        torch.randn(total, heads, dim),
        torch.randn(total, key_heads, dim),
        torch.randn(total, key_heads, dim),
    )


def test_attention_of_bfloat16_is_computed_in_float32() -> None:
    torch.manual_seed(6)
    q, k, v = (torch.randn(40, heads, 16).bfloat16() for heads in (4, 2, 2))
    got = attention.attend(q, k, v, (30, 10), scale=None)
    wanted = attention.attend(q.float(), k.float(), v.float(), (30, 10), scale=None)
    assert got.dtype == torch.bfloat16
    # one rounding of the result, 2^-9 of it
    torch.testing.assert_close(got.float(), wanted, rtol=4e-3, atol=1e-4)


def test_factors_are_converted_once_a_generation() -> None:
    a, b = torch.ones(2, 4), torch.ones(6, 2)
    factors = fused.Factors(*map(holding, (a, b)))
    first = factors.scaled(torch.bfloat16, 0.5)
    a += 1
    assert factors.scaled(torch.bfloat16, 0.5)[0] is first[0]
    assert float(factors.scaled(torch.float32, 0.5)[0][0, 0]) == 1.0
    fused.Factors.generation += 1
    assert float(factors.scaled(torch.float32, 2.0)[0][0, 0]) == 4.0


def test_buckets_hold_like_lengths() -> None:
    lengths = [20, 900, 21, 870, 300, 7]
    groups = attention.bucket(lengths)
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert [sorted(lengths[index] for index in group) for group in groups] == [[870, 900], [300], [7, 20, 21]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_plain_over_several_chunks(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    monkeypatch.setattr(loss, "_ROWS", 17)
    monkeypatch.setattr(loss, "_BLOCK_BYTES", {"cpu": 1})
    weight, bias = torch.randn(700, 12) * 3, torch.randn(700)
    labels = torch.randint(0, 700, (53,))
    labels[::3] = loss.IGNORE
    both(
        lambda h: loss.linear_cross_entropy(h, weight, labels, bias=bias, smoothing=smoothing),
        lambda h: functional.cross_entropy(
            h @ weight.double().T + bias.double(),
            labels,
            ignore_index=-100,
            reduction="none",
            label_smoothing=smoothing,
        )[labels != loss.IGNORE],
        torch.randn(53, 12),
    )


def test_loss_of_extreme_logits_is_finite_and_exact() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    value = loss.linear_cross_entropy(hidden, weight, torch.tensor([1, 0]))
    assert value.tolist() == pytest.approx([300, 300], abs=1e-3)
    value.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0], [-1.0]]), rtol=1e-5, atol=1e-5)
