"""What OnnxKQuantQuantization costs against onnxruntime's own k-quant: peak memory, time, error, bytes.

    python benchmarks/onnx_weights.py [--repeat 1] [--keep FOLDER]

The example's base exported by ModelBuilder in fp32; all its products to asymmetric int4 in blocks of 32, by
our pass and by MatMulNBitsQuantizer with KQuantWeightOnlyQuantConfig. Each is a whole process, from the
folder on disk to the folder on disk, on the threads that OMP_NUM_THREADS allows. Errors are over all
quantised weights of both results, and read back from their files. On a machine that does other work the
CPU seconds and the ratios stand, the wall times do not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantize import base, timed

OURS, THEIRS = "OnnxKQuantQuantization", "KQuantWeightOnlyQuantConfig"
BLOCK = 32


def context(out: Path) -> Any:
    """A context as a document's run gives it, without progress."""
    from olive.config.workflow import Accelerator
    from olive.hardware.probe import probe
    from olive.passes.base import PassContext
    from olive.store.journal import Journal

    class Silent:
        def start(self, task: str, total: int | None = None) -> None: ...
        def update(self, done: int, **fields: float | str) -> None: ...
        def finish(self) -> None: ...
        def note(self, message: str) -> None: ...

    out.mkdir(parents=True)
    here = Accelerator()
    return PassContext(
        out=out,
        machine=probe(),
        accelerator=here,
        target=here,
        data={},
        base_dir=out.parent,
        progress=Silent(),
        journal=Journal(out.parent / f"{out.name}.journal"),
    )


def export(out: Path) -> None:
    """The base in fp32."""
    from olive.models.artifact import Artifact, Kind
    from olive.passes.export.model_builder import ModelBuilder

    model = Artifact(kind=Kind.HF, path=base(), digest="0" * 64)
    ModelBuilder().run(model, ModelBuilder.Params.model_validate({"precision": "fp32"}), context(out))


def ours(source: Path, out: Path) -> None:
    """Our pass, as a worker runs it."""
    from olive.models.artifact import Artifact, Kind
    from olive.passes.registry import resolve

    technique = resolve(OURS)
    model = Artifact(kind=Kind.GENAI, path=source, digest="0" * 64)
    technique().run(model, technique.Params.model_validate({"block_size": BLOCK}), context(out))


def theirs(source: Path, out: Path) -> None:
    """The quantiser of onnxruntime, as its own command line runs it."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        KQuantWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    out.mkdir(parents=True)
    quantiser = MatMulNBitsQuantizer(
        onnx.load(source / "model.onnx"), block_size=BLOCK, algo_config=KQuantWeightOnlyQuantConfig()
    )
    quantiser.process()
    quantiser.model.save_model_to_file(str(out / "model.onnx"), True)


def error(source: Path, made: Path) -> tuple[float, int, int]:
    """Squared error over the sum of squares of the quantised weights, how many they are, and bytes."""
    import numpy as np
    import torch

    from olive.passes.onnx.graphs import Graph
    from olive.passes.onnx.nodes import attributes
    from olive.quantization.packing import unpack

    before, after = Graph(source / "model.onnx"), Graph(made / "model.onnx")
    own = {node.output[0]: node.input[1] for node in before.graph.node if node.op_type == "MatMul"}
    lost = total = 0.0
    count = 0
    for node in after.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        told = attributes(node)
        rows, columns = told["N"], told["K"]
        blocks = -(-columns // told["block_size"])
        packed, scales, zeros = (
            torch.from_numpy(np.array(after.read(name)).reshape(rows, -1)) for name in node.input[1:4]
        )
        codes = unpack(packed, told["bits"], blocks * told["block_size"]).view(rows, blocks, -1).float()
        codes -= unpack(zeros, told["bits"], blocks)[..., None]
        expanded = (codes * scales[..., None]).view(rows, -1)[:, :columns]
        weight = torch.from_numpy(before.read(own[node.output[0]]).T.copy())
        lost += float((expanded - weight).square().sum())
        total += float(weight.square().sum())
        count += 1
    size = sum(path.stat().st_size for path in made.glob("model.onnx*"))
    return lost / total, count, size


def child(work: str, *folders: Path) -> dict[str, float]:
    """One part in a process of its own."""
    command = [sys.executable, __file__, "--work", work, *map(str, folders)]
    done, used = timed(command, dict(os.environ))
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return used | (json.loads(done.stdout.splitlines()[-1]) if work == "error" else {})


def main() -> None:
    """Export, quantise with both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work, folders = given.work[0], [Path(one) for one in given.work[1:]]
        result = {"export": export, "ours": ours, "theirs": theirs, "error": error}[work](*folders)
        if work == "error":
            print(json.dumps(dict(zip(("error", "count", "bytes"), result, strict=True))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = given.keep or Path(scratch)
        source = root / "fp32"
        if not source.is_dir():
            child("export", source)
        size = sum(path.stat().st_size for path in source.glob("model.onnx*"))
        print(f"{base().name} in fp32: {size / 1e6:,.0f} MB; both to int4, blocks of {BLOCK}, asymmetric")
        best: dict[str, dict[str, float]] = {}
        for number in range(given.repeat):
            for work in ("ours", "theirs"):
                out = root / f"{work}-{number}"
                used = child(work, source, out)
                used |= {key: value for key, value in child("error", source, out).items() if key not in used}
                print(
                    f"{OURS if work == 'ours' else THEIRS:28} peak {used['peak'] / 1e6:6,.0f} MB  "
                    f"CPU {used['cpu']:6.1f} s  wall {used['wall']:6.1f} s  "
                    f"{used['count']:.0f} products  error {used['error']:.5f}  {used['bytes'] / 1e6:,.0f} MB"
                )
                if work not in best or used["cpu"] < best[work]["cpu"]:
                    best[work] = used
        for key in ("peak", "cpu", "wall", "error", "bytes"):
            print(f"theirs / ours  {key:5} {best['theirs'][key] / best['ours'][key]:6.2f}")


if __name__ == "__main__":
    main()
