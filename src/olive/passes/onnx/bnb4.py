"""NF4 and FP4 of bitsandbytes, on an ONNX graph.

A weight is flattened row by row, as (outputs, inputs), before it is cut into blocks.
Source: com.microsoft MatMulBnb4 of ONNX Runtime's ContribOperators.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from olive.config.suggest import did_you_mean
from olive.config.workflow import Accelerator
from olive.errors import PassFailed, Problem, Severity
from olive.hardware.machine import Machine
from olive.models.artifact import ModelInfo
from olive.passes.base import PassContext
from olive.passes.onnx.graphs import Graph, Stored
from olive.passes.onnx.products import Found, Product, find, fresh
from olive.passes.onnx.weight_only import Block, NodeParams, WeightPass
from olive.passes.onnx.weights import UINT8, Error, dtype_of, error_of, in_parts, product_nodes, raw, row_of
from olive.passes.quantize import kernels

if TYPE_CHECKING:
    import torch
    from onnx import NodeProto

    from olive.quantization.blockwise import Quantised, Scheme

# where one magnitude ends and the next begins, in the digits that the operator's own quantiser has
_FP4_BOUNDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
_FP4_ORDER = (0, 1, 6, 7, 4, 5, 2, 3)


class OnnxBnb4Quantization(WeightPass["OnnxBnb4Quantization.Params"]):
    """Products of an ONNX model to NF4 or FP4, as QLoRA trains on them."""

    class Params(NodeParams):
        """Type and block of the weights, and which products; names of Olive 0.13."""

        precision: Literal["nf4", "fp4"] = Field("nf4", description="Type of a weight.")
        block_size: Block = Field(64, description="Weights that share a scale.")
        quantized_modules: tuple[str, ...] = Field(
            (),
            description="Modules to quantise, such as q_proj of `.../q_proj/MatMul`; all where empty.",
        )

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Names of nodes, and kernels of the target."""
        yield from super().check(model, params, machine, accelerator)
        if accelerator.execution_provider not in kernels.BNB4:
            yield Problem(
                f"no MatMulBnb4 of {accelerator.execution_provider} was verified here",
                severity=Severity.NOTE,
                fix="OnnxKQuantQuantization has less error at the same size.",
            )

    def find(self, graph: Graph, params: Params, provider: str) -> Found:
        """Products, of the modules named where any are."""
        found = find(graph, ("MatMul", "Gemm"), params.nodes_to_exclude)
        modules = {one.label: re.split(r"[./]", one.label)[-2:][0] for one in found.products}
        for module in params.quantized_modules:
            if module not in modules.values():
                raise PassFailed(
                    f"no product belongs to a module {module!r}",
                    where="quantized_modules",
                    fix=did_you_mean(module, sorted(set(modules.values()))),
                )
        if params.quantized_modules:
            found.products = [one for one in found.products if modules[one.label] in params.quantized_modules]
        return found

    def quantise_products(
        self,
        graph: Graph,
        products: list[Product],
        params: Params,
        ctx: PassContext,
        rows: dict[str, dict[str, Any]],
    ) -> dict[int, list[NodeProto]]:
        """Codes and scales of each weight, once for all nodes that read it in the same way."""
        device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
        names: dict[tuple[str, bool], tuple[str, str]] = {}
        made: dict[int, list[NodeProto]] = {}
        for one in products:
            key = one.weight, one.stored
            if key not in names:
                names[key] = (
                    fresh(graph.weights, f"{one.weight}_Bnb4"),
                    fresh(graph.weights, f"{one.weight}_absmax"),
                )
                graph.put(names[key], partial(_parts, graph, one, params, device, rows))
            node = graph.graph.node[one.place]
            settings = {
                "K": one.columns,
                "N": one.rows,
                "block_size": params.block_size,
                "quant_type": int(params.precision == "nf4"),
            }
            name = f"{node.name}_Bnb4" if node.name else ""
            made[one.place] = product_nodes(node, "MatMulBnb4", names[key], name, settings)
        return made


def quantise(weight: torch.Tensor, scheme: Scheme) -> Quantised:
    """``blockwise.quantise`` with the codes of ONNX Runtime's quantiser, which has a minus zero in FP4."""
    import torch

    from olive.quantization import blockwise

    made = blockwise.quantise(weight, scheme)
    if scheme.kind == "nf4":
        return made
    flat = weight.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % scheme.block)).view(-1, scheme.block)
    scaled = (blocks * (1.0 / made.scales.clamp(min=1e-38))[:, None]).view(-1)
    scaled = scaled[: flat.numel() + flat.numel() % 2]
    bounds = torch.tensor(_FP4_BOUNDS, device=weight.device)
    order = torch.tensor(_FP4_ORDER, dtype=torch.uint8, device=weight.device)
    codes = order[torch.bucketize(scaled.abs(), bounds)] | ((scaled < 0).to(torch.uint8) << 3)
    return replace(made, codes=(codes[::2] << 4) | codes[1::2])


def _parts(
    graph: Graph,
    one: Product,
    params: OnnxBnb4Quantization.Params,
    device: str,
    rows: dict[str, dict[str, Any]],
) -> tuple[Stored, ...]:
    import torch

    from olive.quantization.blockwise import Scheme, dequantise

    began = time.perf_counter()
    scheme = Scheme(params.precision, params.block_size, double=False)

    def part(_: slice, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Error]:
        made = quantise(weight, scheme)
        scales = made.scales.to(dtype_of(one))
        return made.codes.cpu(), scales.cpu(), error_of(weight, dequantise(made))

    codes, scales, errors = zip(*in_parts(graph, one, device, part), strict=True)
    rows[one.label] = row_of(one, 4, params.block_size, errors, began)
    packed, absmax = torch.cat(codes), torch.cat(scales)
    return (
        Stored(packed.numpy(), UINT8, tuple(packed.shape)),
        Stored(raw(absmax), one.data_type, tuple(absmax.shape)),
    )
