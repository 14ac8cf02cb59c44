"""Float32 products stay float32, whoever computes them."""

from __future__ import annotations

import torch

from olive.hardware.probe import probe
from olive.hardware.products import choose_products


def test_products_are_exact_after_the_choice() -> None:
    machine = probe()
    choose_products(machine.cpu, machine.cpu_features)
    torch.manual_seed(1)
    for rows, inner, columns in ((1, 576, 1536), (37, 576, 100), (300, 64, 960)):
        x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
        wanted = x.double() @ weight.double().t()
        for got in (torch.nn.functional.linear(x, weight), x @ weight.t().contiguous()):
            # float32 sums in blocks: far below bfloat16's 3e-3
            assert float((got.double() - wanted).norm() / wanted.norm()) < 2e-6


def test_another_processor_is_left_alone() -> None:
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    was = getattr(settings, "fp32_precision", None)
    assert not choose_products("Intel(R) Xeon(R)", ("avx512f",))
    assert not choose_products("AMD EPYC of another year", ("avx2",))
    assert getattr(settings, "fp32_precision", None) == was
