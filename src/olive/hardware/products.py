"""Float32 matrix products at the processor's own speed. Imports torch, so only where torch already is."""

from __future__ import annotations

from functools import cache
from typing import Any

_EXACT = 2e-6  # relative error of a float32 sum of 512 products; bfloat16 makes 3e-3


@cache
def choose_products(cpu: str, features: tuple[str, ...]) -> bool:
    """Have torch take float32 products from oneDNN where MKL leaves half of the processor idle.

    MKL holds AMD processors to AVX2. oneDNN uses their AVX-512, but torch asks it for float32 only under
    a setting that also allows rounding the factors to bfloat16; so what comes back is compared with float64,
    and the setting is taken back unless it is exact.

    Args:
        cpu: the processor's name.
        features: its flags, as the probe gives them.

    Returns:
        Whether products come from oneDNN now.
    """
    import torch

    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    idle = cpu.startswith("AMD") and "avx512f" in features and torch.backends.mkl.is_available()
    if not idle or not hasattr(settings, "fp32_precision"):
        return False
    was = settings.fp32_precision
    settings.fp32_precision = "bf16"
    if _error() <= _EXACT:
        return True
    settings.fp32_precision = was
    return False


def _error() -> float:
    """Largest relative error of torch's float32 products of every form that a model uses, norm by norm."""
    import torch

    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows in (1, 48, 256):
        x = torch.randn(rows, 512, generator=generator)
        weight = torch.randn(384, 512, generator=generator)
        wanted = x.double() @ weight.double().t()
        forms = (
            torch.nn.functional.linear(x, weight),
            x @ weight.t().contiguous(),
            (x[None] @ weight.t())[0],
        )
        for got in forms:
            worst = max(worst, float((got.double() - wanted).norm() / wanted.norm()))
    return worst
