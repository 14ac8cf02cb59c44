"""The quantising passes on tiny models: what is stored, resumed, refused, and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from safetensors.torch import load_file, save_file

from olive.config.gates import ParityGate
from olive.config.workflow import Accelerator
from olive.engine.gates import parity
from olive.engine.gates.compare import References
from olive.errors import ConfigError, PassFailed, Problem, Severity
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.models.hf import describe, load_model
from olive.models.stream import LazyTensors
from olive.passes.base import PassContext
from olive.passes.export.model_builder import ModelBuilder
from olive.passes.quantize import calibration, layers
from olive.passes.quantize.calibration import Calibration
from olive.passes.quantize.forward import Group
from olive.passes.registry import resolve
from olive.quantization.grid import Grid, round_to_nearest
from olive.quantization.hessian import feedback
from olive.quantization.packing import pack
from tiny import tiny_llama, tiny_phi3
from training_kit import context, data, rows

CALIBRATED = {"calibration_tokens": 256, "data_config": "train"}
PROMPTS = [[11, 52, 97, 200, 33, 64, 120, 7], [9, 250, 31, 77]]


def artifact(folder: Path) -> Artifact:
    return Artifact(kind=Kind.HF, path=folder, digest="0" * 64)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi3(tmp_path_factory.mktemp("phi3"), initializer_range=0.2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), initializer_range=0.2, tie_word_embeddings=False)


def run(name: str, source: Path, folder: Path, **params: Any) -> PassContext:
    folder.mkdir(parents=True, exist_ok=True)
    technique = resolve(name)
    wanted = technique.Params.model_validate(params)
    ctx = context(folder, data(rows(folder, 96)))
    technique().run(artifact(source), wanted, ctx)
    technique().ensure(ctx.out)
    return ctx


def problems(name: str, source: Path, provider: str = "CPUExecutionProvider", **params: Any) -> list[Problem]:
    technique = resolve(name)
    wanted = technique.Params.model_validate(params)
    accelerator = Accelerator(device="cpu", execution_providers=(provider,))
    found = technique().check(describe(source), wanted, probe(), accelerator)
    return [problem for problem in found if problem.severity is Severity.ERROR]


@pytest.mark.parametrize("sym", [False, True])
def test_what_is_stored_is_what_the_mathematics_gives(phi3: Path, tmp_path: Path, sym: bool) -> None:
    ctx = run("Rtn", phi3, tmp_path, bits=4, group_size=32, sym=sym)
    stored, original = load_file(ctx.out / "model.safetensors"), load_file(phi3 / "model.safetensors")
    grid = Grid(4, 32, "full_range" if sym else "asymmetric")
    one = round_to_nearest(original["model.layers.1.mlp.down_proj.weight"], grid)
    assert torch.equal(stored["model.layers.1.mlp.down_proj.qweight"], pack(one.codes, 4))
    assert torch.equal(stored["model.layers.1.mlp.down_proj.scales"], one.scales)
    assert ("model.layers.1.mlp.down_proj.qzeros" in stored) is not sym
    assert torch.equal(stored["model.norm.weight"], original["model.norm.weight"])
    loaded = load_model(ctx.out, dtype="float32")
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight, one.dequantise())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (
        loaded.generation_config.eos_token_id
        == load_model(phi3, dtype="float32").generation_config.eos_token_id
    )
    settings = json.loads((ctx.out / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["symmetric"]) == ("olive", 4, sym)


def test_a_shared_head_stands_for_the_embedding(phi3: Path, tmp_path: Path) -> None:
    ctx = run("KQuant", phi3, tmp_path, lm_head=True, overrides={"lm_head": {"bits": 8}})
    stored = load_file(ctx.out / "model.safetensors")
    assert "model.embed_tokens.weight" not in stored
    loaded = load_model(ctx.out, dtype="float32")
    original = load_model(phi3, dtype="float32")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    scale = float(stored["lm_head.scales"].abs().max())
    assert 0 < float((loaded.lm_head.weight - original.lm_head.weight).detach().abs().max()) <= 0.51 * scale


def test_the_report_has_every_layer(phi3: Path, tmp_path: Path) -> None:
    ctx = run("Gptq", phi3, tmp_path, **CALIBRATED)
    table = ctx.facts["layers"]
    assert [row["name"].rpartition(".")[2] for row in table[:4]] == [
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj",
    ]  # fmt: skip
    assert len(table) == 8
    assert all(0 < row["output_error"] < 0.2 and 0 < row["weight_error"] < 0.1 for row in table)
    assert ctx.facts["calibration_tokens"] == 256
    assert len(ctx.series["quantisation"]) == 8


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_calibration_takes_error_off_the_model(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Next-token distributions on held-out rows: GPTQ below the search, the search below rounding."""
    source: Path = request.getfixturevalue(family)
    held_out = calibration.read(data(rows(tmp_path, 160)), source, tmp_path, tokens=2000, seed=5)
    ids = [list(row) for row in held_out.rows[:40]]
    wanted = [load_model(source, dtype="float32")(torch.tensor([row])).logits.log_softmax(-1) for row in ids]
    found = {}
    for name in ("Rtn", "KQuant", "Gptq"):
        given = {"calibration_tokens": 1500, "data_config": "train"} if name == "Gptq" else {}
        ctx = run(name, source, tmp_path / name, **given)
        model = load_model(ctx.out, dtype="float32")
        kl = 0.0
        for row, p in zip(ids, wanted, strict=True):
            q = model(torch.tensor([row])).logits.log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(-1).mean().detach())
        found[name] = kl / len(ids)
    assert found["Gptq"] < 0.8 * found["KQuant"] < 0.8 * found["Rtn"]


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_the_scale_of_awq_leaves_the_function_as_it_was(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In 8 bits rounding costs little, scaled or not; a scale in the wrong place would cost far more."""
    source: Path = request.getfixturevalue(family)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("layernorm.weight"):  # inputs of different energy, so that scaling pays
            tensors[name][::7] *= 6
    uneven = tmp_path / "uneven"
    uneven.mkdir()
    for path in source.iterdir():
        (uneven / path.name).write_bytes(path.read_bytes())
    save_file(tensors, uneven / "model.safetensors", metadata={"format": "pt"})
    eight = {"bits": 8, "group_size": 16}
    ctx = run("Awq", uneven, tmp_path / "eight", **eight, **CALIBRATED)
    ids = torch.tensor(PROMPTS[:1])
    p = load_model(uneven, dtype="float32")(ids).logits.log_softmax(-1)

    def kl(folder: Path) -> float:
        with torch.inference_mode():
            q = load_model(folder, dtype="float32")(ids).logits.log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).mean())

    assert kl(ctx.out) < 2 * kl(run("Rtn", uneven, tmp_path / "rtn", **eight).out)
    assert any(row["ratio"] > 0 for row in ctx.facts["layers"])
    stored = load_file(ctx.out / "model.safetensors")
    norms = [name for name in tensors if name.endswith("layernorm.weight")]
    assert any(not torch.equal(stored[name], tensors[name]) for name in norms)


@pytest.mark.parametrize("method", ["Gptq", "Awq"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    method: str, phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(method, phi3, tmp_path / "whole", **CALIBRATED)
    plain = layers.LayerStream.sweep

    def killed(self: Any, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        plain(self, number, *rest)

    monkeypatch.setattr(layers.LayerStream, "sweep", killed)
    with pytest.raises(KeyboardInterrupt):
        run(method, phi3, tmp_path / "killed", **CALIBRATED)
    monkeypatch.undo()
    resumed = run(method, phi3, tmp_path / "killed", **CALIBRATED)
    assert resumed.facts["layers_from_journal"] == 1
    assert [row["name"] for row in resumed.facts["layers"]] == [row["name"] for row in whole.facts["layers"]]
    ours, theirs = (load_file(ctx.out / "model.safetensors") for ctx in (resumed, whole))
    assert ours.keys() == theirs.keys()
    if method == "Gptq":
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Awq goes on from the folded form, whose sums round differently: a weight between two codes may turn
    codes = [name for name in ours if name.endswith(".qweight")]
    assert all(float((ours[name] != theirs[name]).float().mean()) < 0.02 for name in codes)


class _Collect:
    """A method that changes nothing and keeps the moments it was given."""

    def __init__(self) -> None:
        self.moments: dict[str, torch.Tensor] = {}
        self.drift: dict[str, torch.Tensor] = {}

    def __call__(self, group: Group, modules: Any) -> None:
        for name, module in modules.items():
            self.moments[name] = group.moments.sums
            self.drift[name] = group.drift
            if name.endswith("layers.0.self_attn.o_proj"):
                module.weight.data *= 0.5


def collected(
    source: Path, made: Calibration, limit: int, monkeypatch: pytest.MonkeyPatch, paired: int = 1000
) -> _Collect:
    monkeypatch.setattr(Calibration, "batches", lambda self, _: _batches(self, limit))
    found = _Collect()
    with LazyTensors(source) as tensors:
        stream = layers.LayerStream(source, tensors, made, "cpu", paired)
        for number in range(len(stream)):
            with stream.layer(number) as layer:
                stream.sweep(number, layer, found)
    return found


_batches: Callable[..., Any] = Calibration.batches


def test_one_batch_and_many_see_the_same_inputs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments are those of hooks on the whole model, without padding, by either way."""
    made = Calibration(((5, 6, 7, 8, 9, 10), (11, 12, 13, 14), (20, 21, 22, 23, 24)))
    one = collected(llama, made, 1000, monkeypatch)
    many = collected(llama, made, 6, monkeypatch)
    model = load_model(llama, dtype="float32")
    sums: dict[str, Any] = {}
    model.model.layers[0].self_attn.o_proj.weight.data *= 0.5
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, given, name=name: sums.__setitem__(
                    name, sums.get(name, 0) + given[0][0].double().T @ given[0][0].double()
                )
            )
    for row in made.rows:
        model(torch.tensor([row]))
    assert one.moments.keys() == many.moments.keys() == sums.keys()
    for name, wanted in sums.items():
        for found in (one, many):
            assert torch.allclose(
                found.moments[name].double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().max())
            )
        assert torch.allclose(one.drift[name], many.drift[name], atol=1e-3 * float(wanted.max()))
    assert float(one.drift["model.layers.0.self_attn.q_proj"].abs().max()) == 0
    assert float(one.drift["model.layers.0.mlp.up_proj"].abs().max()) > 0


def test_the_unchanged_model_runs_on_as_many_tokens_as_asked(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (5, 6, 7, 8, 9, 10), (11, 12, 13, 14, 15, 16), (20, 21, 22, 23, 24, 25)
    part = collected(llama, Calibration(rows), 6, monkeypatch, paired=7)
    alone = collected(llama, Calibration(rows[:2]), 6, monkeypatch)
    for name, wanted in alone.drift.items():
        assert torch.allclose(part.drift[name], wanted, atol=1e-4 * float(wanted.abs().max()))
        assert not torch.equal(part.moments[name], alone.moments[name])


def test_an_input_of_nothing_falls_back_and_says_so(phi3: Path, tmp_path: Path) -> None:
    """A layer whose inputs are all zero is searched without them."""
    source = tmp_path / "silent"
    source.mkdir()
    for path in phi3.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    ctx = run("Gptq", source, tmp_path, **CALIBRATED)
    row = ctx.facts["layers"][0]
    assert "zero" in row["fallback"]
    assert ctx.facts["fallbacks"] >= 1
    assert any("qkv_proj" in note for note in ctx.progress.notes)


def test_a_matrix_that_no_damping_helps_falls_back() -> None:
    assert feedback(torch.full((4, 4), torch.nan), torch.arange(4), 0.1) is None


@pytest.mark.parametrize("name", ["Rtn", "Gptq"])
def test_nan_is_named(phi3: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "nan"
    source.mkdir()
    for path in phi3.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        PassFailed, match=r"model\.layers\.1\.mlp\.down_proj\.weight has 1 values that are NaN"
    ):
        run(name, source, tmp_path, **(CALIBRATED if name == "Gptq" else {}))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"group_size": 48}, "group_size 48 is no block of any kernel"),
        ({"group_size": 256}, "blocks of 256 do not divide"),
        ({"embeds": True}, "embeds needs lm_head"),
        ({"overrides": {"*.no_proj": {"bits": 8}}}, "no layer is called"),
        ({"modules_to_not_convert": ["*"]}, "no layer to quantise"),
    ],
)
def test_what_cannot_work_is_refused_at_plan(phi3: Path, params: dict[str, Any], message: str) -> None:
    found = problems("Rtn", phi3, **params)
    assert found
    assert message in found[0].message
    assert found[0].fix


def test_an_embedding_of_its_own_is_refused(llama: Path) -> None:
    assert "matrix of its own" in problems("Rtn", llama, lm_head=True, embeds=True)[0].message


def test_projections_that_the_export_packs_are_alike(llama: Path) -> None:
    found = problems("Rtn", llama, overrides={"*.q_proj": {"bits": 8}})
    assert "packs them into one matrix" in found[0].message
    assert not problems("Rtn", llama, overrides={"*.[qkv]_proj": {"bits": 8}})


def test_quantised_twice_is_refused(phi3: Path, tmp_path: Path) -> None:
    ctx = run("Rtn", phi3, tmp_path)
    assert "stored quantised (olive) already" in problems("Rtn", ctx.out)[0].message


def test_calibration_needs_data(phi3: Path, tmp_path: Path) -> None:
    assert "nothing to calibrate on" in problems("Gptq", phi3)[0].message
    with pytest.raises(ConfigError, match="needs 256"):
        calibration.read(data(rows(tmp_path, 4)), phi3, tmp_path, tokens=1000, seed=0)


def test_experts_are_left_to_the_search(tmp_path: Path, phi3: Path) -> None:
    info = describe(phi3)
    expert = {
        "model.layers.0.mlp.experts.0.up_proj.weight": ("F32", (64, 64)),
        "model.layers.0.mlp.gate.weight": ("F32", (64, 64)),
    }
    info = info.model_copy(update={"tensors": info.tensors | expert})
    technique = resolve("Gptq")
    found = list(technique().check(info, technique.Params(data_config="train"), probe(), Accelerator()))
    assert "has experts" in found[-1].message
    from olive.passes.quantize.targets import chosen

    names = chosen(info, resolve("KQuant").Params())
    assert "model.layers.0.mlp.experts.0.up_proj" in names
    assert "model.layers.0.mlp.gate" not in names


def test_batches_keep_similar_lengths_together() -> None:
    made = Calibration(tuple(tuple(range(1, n + 1)) for n in (3, 30, 20, 9, 31)))
    found = made.batches(limit=64)
    assert [ids.shape for ids, _ in found] == [(2, 31), (1, 20), (1, 9), (1, 3)]
    assert sum(int(real.sum()) for _, real in found) == made.tokens
    for ids, real in found:
        assert bool((ids[~real] == 0).all())
        assert bool((ids[real] > 0).all())


def export(source: Path, folder: Path, **params: Any) -> PassContext:
    folder.mkdir(parents=True)
    ctx = context(folder, data(rows(folder)))
    ModelBuilder().run(
        artifact(source), ModelBuilder.Params.model_validate({"precision": "int4"} | params), ctx
    )
    return ctx


@pytest.mark.parametrize(
    ("family", "params"),
    [
        ("phi3", {}),
        ("phi3", {"sym": True, "group_size": 16}),
        ("phi3", {"lm_head": True, "overrides": {"lm_head": {"bits": 8}, "*.down_proj": {"bits": 8}}}),
        ("phi3", {"lm_head": True}),
        ("llama", {"lm_head": True, "overrides": {"*.gate_proj": {"bits": 8, "group_size": 16}}}),
    ],
)
def test_the_export_holds_the_same_integers_and_runs(
    family: str, params: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Codes, scales and zero points byte for byte; logits as PyTorch's on those integers."""
    ctx = run("KQuant", request.getfixturevalue(family), tmp_path / "quantised", **params)
    made = export(ctx.out, tmp_path / "export", accuracy_level=1)
    stored = load_file(ctx.out / "model.safetensors")
    held = {
        value.name: to_array(value, str(made.out))
        for value in onnx.load(made.out / "model.onnx", load_external_data=False).graph.initializer
        if "MatMulNBits" in value.name
    }
    seen = 0
    for name, value in held.items():
        if name.startswith("lm_head."):
            mine = [stored[f"lm_head.{name.rpartition('.')[2]}"]]
        else:
            number, _, last, kind = (
                name.split(".")[2],
                *name.rpartition(".MatMulNBits.")[0].rpartition(".")[1:],
                name.rpartition(".")[2],
            )
            mine = _rows_of(stored, number, last, kind)
        if mine:
            assert value.tobytes() == b"".join(part.contiguous().numpy().tobytes() for part in mine), name
            seen += 1
    assert seen >= 3 * 2 * 3
    made.attributes["precision"] = "int4"
    gate = parity.check(artifact(ctx.out), made.out, ParityGate(), made, PROMPTS)
    if params.get("lm_head"):
        assert gate.figures["kl"] < 1e-3


def _rows_of(stored: dict[str, torch.Tensor], number: str, last: str, kind: str) -> list[torch.Tensor]:
    prefix = f"model.layers.{number}"
    places = {"qkv_proj": "self_attn", "o_proj": "self_attn"}
    key = f"{prefix}.{places.get(last, 'mlp')}.{last}.{kind}"
    if key in stored:
        return [stored[key]]
    if last == "qkv_proj":
        parts = [f"{prefix}.self_attn.{one}.{kind}" for one in ("q_proj", "k_proj", "v_proj")]
        return [stored[part] for part in parts] if parts[0] in stored else []
    fused = f"{prefix}.mlp.gate_up_proj.{kind}"
    if fused in stored:
        half = stored[fused].shape[0] // 2
        return [stored[fused][:half] if last == "gate_proj" else stored[fused][half:]]
    return []


@pytest.mark.parametrize(
    ("params", "precision", "message"),
    [
        ({}, "fp32", "precision fp32 would undo that"),
        ({"group_size": -1, "overrides": {"*.down_proj": {"group_size": 32}}}, "int4", "a whole row"),
        (
            {"modules_to_not_convert": ["*.down_proj"]},
            "int4",
            "stays in floating point among layers of integers",
        ),
    ],
)
def test_what_the_builder_cannot_take_over_is_named(
    phi3: Path, tmp_path: Path, params: dict[str, Any], precision: str, message: str
) -> None:
    ctx = run("Rtn", phi3, tmp_path / "quantised", **params)
    with pytest.raises(PassFailed, match=message):
        export(ctx.out, tmp_path / "export", precision=precision)


def test_the_gate_holds_the_integers_against_the_model(phi3: Path, tmp_path: Path) -> None:
    ctx = run("Rtn", phi3, tmp_path)
    known = References()
    result = parity.check(artifact(phi3), ctx.out, ParityGate(), ctx, PROMPTS, known)
    assert 0 < result.figures["kl"] < 2.0
    assert known.take(ctx.out, PROMPTS) is not None
    with pytest.raises(PassFailed, match=r"Rtn|KL"):
        parity.check(artifact(phi3), ctx.out, ParityGate(max_kl=1e-9), ctx, PROMPTS)
