"""QuaRot and SpinQuant: the same function in every family, easier weights, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from olive.config.gates import EquivalenceGate
from olive.engine.gates import equivalence
from olive.errors import ConfigError, PassFailed
from olive.models.artifact import Artifact, Kind
from olive.models.hf import describe, load_model, open_model
from olive.passes.quantize import residual, rotated
from olive.passes.quantize.quarot import QuaRot
from olive.passes.quantize.rotation_learning import RotatedNetwork
from olive.passes.quantize.spinquant import SpinQuant
from olive.passes.quantize.targets import CHOICE
from olive.quantization.rotations import cayley
from passes_kit import run
from tiny import tiny_llama, tiny_phi3, tiny_tokenizer
from training_kit import context, data, rows

SETTINGS: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 2,
    "dtype": "float32",
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "phi3": ("phi3", {"tie_word_embeddings": False, "original_max_position_embeddings": 512}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
    "ernie": ("ernie4_5", {"use_bias": True, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("mixtral", EXPERTS | {"tie_word_embeddings": False}),
    "qwen2-moe": (
        "qwen2_moe",
        EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "qwen3-moe": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 32, "decoder_sparse_step": 2}),
}


def model(folder: Path, kind: str, **overrides: Any) -> Path:
    """A random model of a family whose norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_tokenizer(folder)
    count = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    config = AutoConfig.for_model(kind, **(SETTINGS | {"vocab_size": count} | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.4 * torch.randn_like(parameter))
                    assert "weight" in name or "bias" in name
    made.save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return load_model(folder, dtype="float32")(ids).logits.double()


def distance(source: Path, made: Path) -> float:
    """Mean KL of next-token distributions, nat."""
    p, q = logits(source).log_softmax(-1), logits(made).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays_the_same(family: str, tmp_path: Path) -> None:
    kind, overrides = FAMILIES[family]
    source = model(tmp_path / "model", kind, **overrides)
    ctx = run("QuaRot", source, tmp_path / "rotated")
    before, after = logits(source), logits(ctx.out)
    # float32 through the model: differences of 1e-5 of the largest logit
    torch.testing.assert_close(after, before, rtol=0, atol=3e-5 * float(before.abs().max()))
    old, new = load_file(source / "model.safetensors"), load_file(ctx.out / "model.safetensors")
    assert new.keys() == old.keys() | {"lm_head.weight"}
    config = json.loads((ctx.out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert ctx.facts["untied"] is ("lm_head.weight" not in old)
    norm = 0.0 if kind == "gemma" else 1.0
    kept = [name for name in old if "_norm" in name]
    for name, value in new.items():
        if name in kept:
            assert torch.equal(value, old[name])
        elif "norm" in name:
            assert torch.equal(value, torch.full_like(value, norm))
        elif value.dim() == 2:
            assert name == "lm_head.weight" or not torch.allclose(value, old[name], atol=1e-2)
    technique = QuaRot()
    info, left = describe(source), describe(ctx.out)
    foreseen = technique.leaves(info, QuaRot.Params())
    assert foreseen.tensors == left.tensors
    assert foreseen.config["tie_word_embeddings"] is False
    assert technique.estimate(info, QuaRot.Params(), ctx.machine, {}).disk == ctx.facts["bytes"]
    said = [
        problem.message for problem in technique.check(info, QuaRot.Params(), ctx.machine, ctx.accelerator)
    ]
    assert any("become two" in message for message in said) is ctx.facts["untied"]


def test_random_matrices_seeds_and_a_dtype(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "llama")
    one = run("QuaRot", source, tmp_path / "one", rotate_mode="random", seed=1)
    same = run("QuaRot", source, tmp_path / "same", rotate_mode="random", seed=1)
    other = run("QuaRot", source, tmp_path / "other", rotate_mode="random", seed=2)
    weights = [(ctx.out / "model.safetensors").read_bytes() for ctx in (one, same, other)]
    assert weights[0] == weights[1] != weights[2]
    assert distance(source, one.out) < 1e-8
    half = run("QuaRot", source, tmp_path / "half", dtype="bfloat16")
    codes = {code for code, _ in describe(half.out).tensors.values()}
    assert codes == {"BF16"}
    assert 1e-8 < distance(source, half.out) < 0.1


def test_an_order_without_a_hadamard_matrix(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "llama", hidden_size=52, head_dim=13 * 2, num_key_value_heads=4)
    ctx = run("QuaRot", source, tmp_path / "rotated")
    assert any("order 52" in note for note in ctx.facts["notes"])
    assert any("order 26" in note for note in ctx.facts["notes"])
    assert distance(source, ctx.out) < 1e-8


def test_weights_in_several_files_and_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "model", "qwen2", num_hidden_layers=1)
    (source / CHOICE).write_text('{"model.layers.0.mlp.down_proj": {"bits": 8}}')
    whole = run("QuaRot", source, tmp_path / "whole")
    assert (whole.out / CHOICE).read_text() == (source / CHOICE).read_text()
    sharded = tmp_path / "sharded"
    load_model(source, dtype="float32").save_pretrained(sharded, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes((source / name).read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 1
    monkeypatch.setattr(rotated, "_CELLS", 48 * 30)
    pieces = run("QuaRot", sharded, tmp_path / "pieces")
    assert torch.allclose(logits(pieces.out), logits(whole.out), atol=1e-5)
    table = json.loads((pieces.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" in table


def outliers(folder: Path) -> Path:
    """A model with a channel in each block whose weights are loud and whose activations are quiet."""
    source = tiny_llama(folder, hidden=128, initializer_range=0.1)
    tensors = load_file(source / "model.safetensors")
    loud = [5, 40, 77, 100]
    for name, value in tensors.items():
        if name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        ):
            value[:, loud] *= 20.0
        elif name == "model.embed_tokens.weight":
            value[:, loud] /= 20.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_outliers_cost_less_after_a_rotation(tmp_path: Path) -> None:
    source = outliers(tmp_path / "model")
    plain = run("Rtn", source, tmp_path / "rtn")
    rotation = run("QuaRot", source, tmp_path / "rotated")
    after = run("Rtn", rotation.out, tmp_path / "rotated-rtn")
    assert distance(source, rotation.out) < 1e-7
    assert distance(source, after.out) < 0.7 * distance(source, plain.out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma2"}, "normalises what attention and MLP write"),
        ({"model_type": "stablelm"}, "subtracts the mean"),
        ({"model_type": "mamba"}, "not known"),
        ({"num_key_value_heads": 1}, "does not fit"),
        ({"hidden_size": 32}, "does not fit"),
        ({"tie_word_embeddings": False}, "no lm_head.weight"),
        ({"num_attention_heads": None}, "how wide"),
        ({"quantization_config": {"quant_method": "gptq"}}, "stored quantised"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_its_headers(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    info = describe(tiny_llama(tmp_path / "model"))
    changed = info.model_copy(update={"config": info.config | change})
    with pytest.raises(ConfigError) as caught:
        residual.stream_of(changed)
    assert said in str(caught.value)


def test_a_tensor_of_unknown_place_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    info = describe(tiny_phi3(tmp_path / "model"))
    more = info.tensors | {"model.layers.0.self_attn.sinks": ("F32", (4,))}
    less = {name: value for name, value in info.tensors.items() if name != "model.norm.weight"}
    normed = info.tensors | {"model.norm.bias": ("F32", (64,))}
    for tensors, said in ((more, "sinks"), (less, "model.norm.weight"), (normed, "LayerNorm")):
        problems = list(residual.check(info.model_copy(update={"tensors": tensors})))
        assert said in problems[0].message


def test_the_gate_holds_the_rotated_model(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "llama")
    ctx = run("QuaRot", source, tmp_path / "rotated")
    before = Artifact(kind=Kind.HF, path=source, digest="0" * 64)
    result = equivalence.check(before, ctx.out, EquivalenceGate(), ctx, [])
    assert result.passed
    assert result.figures["kl"] < 1e-8
    tensors = load_file(ctx.out / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][:, 0] *= -1  # one column turned the wrong way
    save_file(tensors, ctx.out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PassFailed, match="equivalence gate"):
        equivalence.check(before, ctx.out, EquivalenceGate(), ctx, [])


LEARNING: dict[str, Any] = {
    "data_config": "train", "calibration_tokens": 800, "iters": 30, "batch_tokens": 256, "group_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "phi3", "gemma", "granite"])
def test_learned_rotations_keep_the_function_and_lose_less(family: str, tmp_path: Path) -> None:
    kind, overrides = FAMILIES[family]
    source = model(tmp_path / "model", kind, **overrides)
    ctx = run("SpinQuant", source, tmp_path / "learned", **LEARNING)
    assert distance(source, ctx.out) < 1e-8
    facts, series = ctx.facts, ctx.series["rotation"]
    assert facts["loss_after"] < 0.98 * facts["loss_before"]
    measured = {point["step"]: point["held_out_kl"] for point in series if "held_out_kl" in point}
    assert facts["loss_after"] == min(measured.values()) == measured[facts["best_step"]]
    assert facts["held_out_tokens"] >= facts["calibration_tokens"] / 8


def test_what_is_turned_on_is_what_is_written(tmp_path: Path) -> None:
    """The learning's products against the folder's, of every tensor; and no distance without rounding."""
    for name in ("llama-biases", "phi3", "gemma"):
        kind, overrides = FAMILIES[name]
        source = model(tmp_path / name, kind, **overrides)
        stream = residual.stream_of(describe(source))
        by = rotated.draw(stream, "hadamard", 0)
        with open_model(source)[0] as tensors:
            weights = rotated.folded(tensors, stream)
            wanted = {
                key: rotated.turned(
                    fold, tensors[fold.source], tensors[fold.norm] if fold.norm else None, stream, by
                )
                for key, fold in stream.folds.items()
            }
        network = RotatedNetwork(load_model(source, dtype="float32"), weights, stream, {}, by)
        ids = torch.arange(3, 43).view(2, 20)
        batch = ids, torch.ones_like(ids, dtype=torch.bool)
        references = network.references([batch])
        network.turn(network.first, network.heads)
        for key, value in network.turned.items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=2e-6)
        assert abs(network.loss([batch], references)) < 1e-6
        by_first, by_heads, loss = network.directions(batch, references[0])
        assert abs(loss) < 1e-6
        assert float((by_first - by_first.T).abs().max()) < 1e-3  # at the least of all losses
        assert float((by_heads - by_heads.mT).abs().max()) < 1e-3


def test_directions_are_the_slope_of_the_loss(tmp_path: Path) -> None:
    """Against finite differences, of weights with a fixed error in place of the rounding's."""
    kind, overrides = FAMILIES["llama-biases"]
    source = model(tmp_path / "model", kind, **overrides)
    stream = residual.stream_of(describe(source))
    by = rotated.draw(stream, "random", 0)
    with open_model(source)[0] as tensors:
        weights = rotated.folded(tensors, stream)
    network = RotatedNetwork(load_model(source, dtype="float32"), weights, stream, {}, by)
    ids = torch.arange(3, 43).view(2, 20)
    batch = ids, torch.ones_like(ids, dtype=torch.bool)
    references = network.references([batch])
    network.turn(network.first, network.heads)
    draw = torch.Generator().manual_seed(0)
    errors = {
        name: 0.05 * torch.randn(value.shape, generator=draw)
        for name, value in network.turned.items()
        if value.dim() == 2
    }
    place = {name: value.clone() for name, value in network.turned.items()}
    first, heads = network.first, network.heads

    def disturbed(one: torch.Tensor, others: torch.Tensor) -> float:
        """The loss with a fixed error on weights that were turned on: what passes straight through."""
        network.first, network.heads = first @ one, heads @ others
        network.turned = {name: value.clone() for name, value in place.items()}
        network.turn(one, others)
        for name, error in errors.items():
            network.parameters[name].data = network.turned[name] + error
        return network.loss([batch], references)

    eye, eyes = torch.eye(48, dtype=torch.float64), torch.eye(12, dtype=torch.float64).expand(2, -1, -1)
    start = disturbed(eye, eyes)
    assert start > 0.01
    by_first, by_heads, _ = network.directions(batch, references[0])
    skew, skews = (by_first - by_first.T) / 2, (by_heads - by_heads.mT) / 2
    step = 1e-3
    for along, move in (
        (skew, lambda size, one: (cayley(size * one), eyes)),
        (skews, lambda size, one: (eye, cayley(size * one))),
    ):
        unit = along / torch.linalg.vector_norm(along)
        slope = (disturbed(*move(-step, unit)) - disturbed(*move(step, unit))) / (2 * step)
        assert slope == pytest.approx(float((along * unit).sum()), rel=0.03)


def test_a_learned_rotation_is_the_same_again_and_never_worse_than_its_start(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "llama", num_hidden_layers=1)
    short = LEARNING | {"iters": 6}
    one, same = (run("SpinQuant", source, tmp_path / name, **short) for name in ("one", "same"))
    weights = [(ctx.out / "model.safetensors").read_bytes() for ctx in (one, same)]
    assert weights[0] == weights[1]
    wild = run("SpinQuant", source, tmp_path / "wild", **(short | {"lr": 1.0, "bits": 8}))
    assert wild.facts["loss_after"] <= wild.facts["loss_before"]
    start = run("QuaRot", source, tmp_path / "start")
    if wild.facts["best_step"] == 0:
        ours, theirs = (load_file(ctx.out / "model.safetensors") for ctx in (wild, start))
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


@pytest.mark.parametrize(
    ("family", "params", "said"),
    [
        ("llama-tied", {}, "nothing to calibrate on"),
        ("llama-tied", {"data_config": "train", "group_size": 32}, "do not divide"),
        ("qwen3-moe", {"data_config": "train", "group_size": 16}, "experts"),
    ],
)
def test_what_cannot_be_learned_is_refused_at_plan(
    family: str, params: dict[str, Any], said: str, tmp_path: Path
) -> None:
    kind, overrides = FAMILIES[family]
    info = describe(model(tmp_path / "model", kind, **overrides))
    ctx = context(tmp_path, data(rows(tmp_path)))
    given = SpinQuant.Params.model_validate(params)
    problems = list(SpinQuant().check(info, given, ctx.machine, ctx.accelerator))
    assert any(said in problem.message for problem in problems)
