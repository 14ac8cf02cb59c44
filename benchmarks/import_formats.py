"""GPTQ and AWQ to the bytes of MatMulNBits: ours against onnxruntime-genai's loader, on one matrix.

    python benchmarks/import_formats.py [--sizes 4096x4096 3584x18944] [--repeats 5]

Each case runs in a process of its own, on one thread: random integers packed as the format says, turned into
MatMulNBits' bytes by the installed onnxruntime-genai (its loader's own methods, from the tensors in memory
on) and by ours (the view that an export reads, from the safetensors file on). Both must give the integers and
zero points that were drawn. Seconds of the processor, the least of the repeats; memory is what the process
grew by above the packed tensors. genai keeps float16 weights in between: with scales in float16 its integers
may come out different, which is counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GROUP = 128
CASES = (("gptq", False), ("gptq", True), ("awq", False))


def seconds(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Least processor time of a call, and what it gave."""
    best, made = float("inf"), None
    for _ in range(repeats):
        began = time.process_time()
        made = call()
        best = min(best, time.process_time() - began)
    return best, made


def peak_growth(call: Callable[[], Any]) -> int:
    """Bytes by which the resident memory rose at its highest during a call (Linux)."""

    def read(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
    before = read("VmRSS")
    made = call()
    grown = read("VmHWM") - before
    del made
    return grown


def packed(kind: str, sym: bool, rows: int, columns: int) -> tuple[dict[str, Any], Any, Any]:
    """Tensors of a layer, and the codes (rows, columns) and zero points (rows, blocks) in them."""
    import torch

    torch.manual_seed(0)
    blocks = columns // GROUP
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    zeros = torch.full((rows, blocks), 8) if sym else torch.randint(1, 16, (rows, blocks))
    scales = ((torch.rand(rows, blocks) + 0.5) * 0.01).half()

    def words(values: Any, order: tuple[int, ...]) -> Any:
        parts = values.to(torch.int64).reshape(values.shape[0], -1, 8)
        word = sum(parts[:, :, source] << (4 * place) for place, source in enumerate(order))
        return word.to(torch.int64).sub((word >> 31) << 32).to(torch.int32)  # two's complement

    plain, awq = tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)
    if kind == "awq":
        made = {"qweight": words(codes.T, awq), "qzeros": words(zeros.T, awq)}
    else:
        made = {"qweight": words(codes, plain).T, "qzeros": words(zeros.T - 1, plain)}
        made["g_idx"] = torch.arange(columns, dtype=torch.int32) // GROUP
    made["scales"] = scales.T
    return {name: value.contiguous() for name, value in made.items()}, codes, zeros


def genai(kind: str, tensors: dict[str, Any], columns: int, rows: int) -> Any:
    """The installed loader's own steps on one layer."""
    from onnxruntime_genai.models.loaders.awq import AWQModel
    from onnxruntime_genai.models.loaders.base import QuantizedTensorModule
    from onnxruntime_genai.models.loaders.gptq import GPTQModel

    module: Any = QuantizedTensorModule()
    module.bits, module.group_size = 4, GROUP
    for name, value in tensors.items():
        setattr(module, name, value)
    loader = (AWQModel if kind == "awq" else GPTQModel).__new__(AWQModel if kind == "awq" else GPTQModel)
    loader.set_quantized_tensor_properties(module)
    loader.repack_quantized_tensor(module, True)
    return module


def child(kind: str, sym: bool, rows: int, columns: int, repeats: int) -> dict[str, Any]:
    """One case, in this process."""
    import torch
    from safetensors.torch import save_file

    from olive.models.foreign.opened import open_tensors
    from olive.quantization.packing import pack

    torch.set_num_threads(1)
    tensors, codes, zeros = packed(kind, sym, rows, columns)
    wanted = pack(codes.to(torch.uint8), 4), pack(zeros.to(torch.uint8), 4)
    name = "model.layers.0.mlp.down_proj"
    with tempfile.TemporaryDirectory() as folder:
        layer = {f"{name}.{part}": value for part, value in tensors.items()}
        save_file(layer, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        given = {"quant_method": kind, "bits": 4, "group_size": GROUP, "sym": sym, "desc_act": False}
        opened, _ = open_tensors(Path(folder), {"quantization_config": given})
        with opened:
            parts = [part for part in opened.layout if part.startswith(name)]

            def ours() -> dict[str, Any]:
                return {part.rpartition(".")[2]: opened[part] for part in parts}

            own, made = seconds(ours, repeats)
            own_memory = peak_growth(ours)
    identical = torch.equal(made["qweight"], wanted[0])
    identical &= ("qzeros" not in made) if sym else torch.equal(made["qzeros"], wanted[1])
    del made

    def theirs() -> Any:
        return genai(kind, dict(tensors), columns, rows)

    other, module = seconds(theirs, 1 if repeats < 3 else 2)
    found = module.qweight.reshape(wanted[0].shape)
    wrong = int((found != wanted[0]).sum())
    del module, found
    return {
        "ours": own, "genai": other, "ours_memory": own_memory, "genai_memory": peak_growth(theirs),
        "identical": bool(identical), "genai_bytes_wrong": wrong,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["4096x4096", "3584x3584", "3584x18944"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        rows, columns = map(int, given.sizes[0].split("x"))
        print(json.dumps(child(given.child[0], given.child[1] == "sym", rows, columns, given.repeats)))
        return
    print("rows x columns  format      ours      genai    ratio   memory ours / genai   integers")
    for size in given.sizes:
        for kind, sym in CASES:
            command = [sys.executable, __file__, "--sizes", size, "--repeats", str(given.repeats)]
            command += ["--child", kind, "sym" if sym else "asym"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            one = json.loads(done.stdout.splitlines()[-1])
            same = "identical" if one["identical"] else "DIFFERENT"
            same += f"; genai: {one['genai_bytes_wrong']} bytes wrong"
            print(
                f"{size:<15} {kind + (' sym' if sym else ' asym'):<10} {one['ours'] * 1e3:6.1f} ms "
                f"{one['genai'] * 1e3:8.0f} ms {one['genai'] / one['ours']:6.0f}x "
                f"{one['ours_memory'] >> 20:6} / {one['genai_memory'] >> 20:5} MiB   {same}",
                flush=True,
            )


if __name__ == "__main__":
    main()
