"""Bits by layer: the knapsack, the rules, the sensitivity, and that the next quantiser obeys."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from olive.config.gates import ParityGate
from olive.config.workflow import Accelerator
from olive.engine.gates import quantised
from olive.engine.rungs import advice
from olive.errors import ConfigError, PassFailed, Severity
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.models.hf import describe
from olive.passes.base import PassContext
from olive.passes.quantize import precision, targets
from olive.passes.quantize.options import choose_within, units_of
from olive.passes.quantize.targets import CHOICE, Override
from olive.passes.registry import resolve
from olive.quantization.knapsack import choose
from olive.store.statistics import Statistics
from tiny import tiny_llama
from training_kit import context, data, rows


@pytest.mark.parametrize("seed", range(60))
def test_knapsack_is_as_good_as_every_combination(seed: int) -> None:
    draw = random.Random(seed)
    items = [
        [(draw.randint(1, 9), draw.random()) for _ in range(draw.randint(1, 3))]
        for _ in range(draw.randint(1, 7))
    ]
    budget = draw.randint(1, 45)
    found = choose(items, budget)
    totals = [
        (sum(size for size, _ in each), sum(loss for _, loss in each)) for each in itertools.product(*items)
    ]
    fitting = [loss for size, loss in totals if size <= budget]
    if not fitting:
        assert found is None
        return
    assert found is not None
    taken = [item[number] for item, number in zip(items, found, strict=True)]
    assert sum(size for size, _ in taken) <= budget
    assert sum(loss for _, loss in taken) == pytest.approx(min(fitting), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_rounded_sizes_hold_the_budget_and_lose_next_to_nothing(seed: int) -> None:
    draw = random.Random(seed)
    items = [
        sorted((draw.randint(10**5, 10**6), draw.random()) for _ in range(draw.randint(2, 5)))
        for _ in range(8)
    ]
    least = sum(item[0][0] for item in items)
    spare = draw.randint(10**5, 3 * 10**6)
    found = choose_within(items, least + spare)
    assert found is not None
    taken = [item[number] for item, number in zip(items, found, strict=True)]
    assert sum(size for size, _ in taken) <= least + spare
    exact = choose(items, least + spare - 2 * len(items) * spare // 2048)
    assert exact is not None
    loss = sum(item[number][1] for item, number in zip(items, exact, strict=True))
    assert sum(each for _, each in taken) <= loss + 1e-12
    assert choose_within(items, least - 1) is None


def test_losses_come_near_the_true_kl_at_every_setting(tmp_path: Path) -> None:
    import torch

    from olive.models.hf import load_model
    from olive.models.quantised import Layer
    from olive.passes.quantize.divergence import Subject, losses
    from olive.quantization.k_quant import magnitudes, search
    from training_kit import Notes

    model = load_model(tiny_llama(tmp_path / "m", initializer_range=0.2), dtype="float32")
    model = model.requires_grad_(False).eval()
    ids = torch.randint(6, 300, (16, 64), generator=torch.Generator().manual_seed(0))
    settings = [Layer(4, 32, False), Layer(8, 32, False), Layer(4, 16, False)]
    names = list(targets.chosen(describe(tmp_path / "m"), resolve("Rtn").Params()))
    before = {name: model.get_submodule(name).weight.clone() for name in names}
    real = torch.ones_like(ids, dtype=torch.bool)
    subject = Subject(lambda: model, lambda: [(ids, real)], {}, None, 0)
    found, scales = losses(subject, dict.fromkeys(names, settings), Notes(), Statistics())
    assert all(value > 0 for value in scales.values())
    pairs = []
    with torch.no_grad():
        own = model(input_ids=ids).logits.log_softmax(-1)
        for name in names:
            weight = model.get_submodule(name).weight
            assert torch.equal(weight, before[name])  # the measurements leave the model as it was
            for place, one in enumerate(settings):
                weight.copy_(search(weight, one.grid, magnitudes(weight, one.grid)).dequantise())
                now = model(input_ids=ids).logits.log_softmax(-1)
                weight.copy_(before[name])
                pairs.append((place, found[name][place], float((own.exp() * (own - now)).sum(-1).mean())))
    for place in (0, 2):
        estimates = sum(guess for number, guess, _ in pairs if number == place)
        assert estimates == pytest.approx(sum(true for number, _, true in pairs if number == place), rel=0.35)
    logs = torch.tensor([(guess, true) for number, guess, true in pairs if number != 1]).log().T
    assert float((logs[0] - logs[1]).abs().mean()) < 0.6


def test_preset_of_thirty_layers() -> None:
    kinds = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    names = [f"model.layers.{n}.{kind}" for n in range(30) for kind in kinds] + ["lm_head"]
    # 30/8 = 3.75: layers 0-3; 26.25: 27-29; between, 3 + 2 = 5 and every third from there
    rich = [0, 1, 2, 3, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    down = {f"model.layers.{n}.mlp.down_proj" for n in rich} | {"lm_head"}
    assert precision.preset("k_quant_last", names, 30) == {"lm_head"}
    assert precision.preset("k_quant_down", names, 30) == down
    mixed = down | {f"model.layers.{n}.self_attn.qkv_proj" for n in rich}
    assert precision.preset("k_quant_mixed", names, 30) == mixed


def test_choice_is_obeyed_under_the_documents_overrides(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    name = "model.layers.0.mlp.down_proj"
    precision.write(folder, {name: Override(bits=8)})
    rtn = resolve("Rtn").Params
    assert targets.chosen(describe(folder), rtn())[name].bits == 8
    assert targets.chosen(describe(folder), rtn())["model.layers.1.mlp.down_proj"].bits == 4
    over = rtn.model_validate({"overrides": {"*.down_proj": {"bits": 2}}})
    assert targets.chosen(describe(folder), over)[name].bits == 2
    (folder / CHOICE).write_text(json.dumps({name: {"bits": 5}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="no table of bits"):
        targets.chosen(describe(folder), rtn())


def test_q_k_and_v_are_one_item() -> None:
    names = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"]
    assert units_of(names) == [tuple(names[:3]), (names[3],)]


def test_estimate_ranks_as_true_kl(tmp_path: Path) -> None:
    import torch

    from olive.models.hf import load_model
    from olive.quantization.sensitivity import expected_kl

    model = load_model(tiny_llama(tmp_path / "m"), dtype="float32").requires_grad_(False).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 300, (16, 64), generator=draw)
    changes = {}
    for place, name in enumerate(targets.chosen(describe(tmp_path / "m"), resolve("Rtn").Params())):
        weight = model.get_submodule(name).weight
        scale = 0.02 * 1.6 ** (place % 7) * weight.std()
        changes[name] = [scale * torch.randn(weight.shape, generator=draw)]
    found = expected_kl(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], changes)
    true = {}
    with torch.no_grad():
        own = model(input_ids=ids).logits.log_softmax(-1)
        for name, (change,) in changes.items():
            weight = model.get_submodule(name).weight
            weight += change
            now = model(input_ids=ids).logits.log_softmax(-1)
            weight -= change
            true[name] = float((own.exp() * (own - now)).sum(-1).mean())
    pairs = torch.tensor([[found[name][0], true[name]] for name in changes]).T
    ranks = pairs.argsort(1).argsort(1).float()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.85


def _run(name: str, source: Path, folder: Path, **params: object) -> PassContext:
    folder.mkdir(parents=True)
    technique = resolve(name)
    ctx = context(folder, data(rows(folder, 96)))
    model = Artifact(kind=Kind.HF, path=source, digest="0" * 64)
    technique().run(model, technique.Params.model_validate(params), ctx)
    technique().ensure(ctx.out)
    return ctx


MEASURED = {"data_config": "train", "calibration_tokens": 256}


def test_budget_is_met_and_what_the_quantiser_stores(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", initializer_range=0.2)
    chosen = _run("SelectiveMixedPrecision", folder, tmp_path / "c", bits_per_weight=7.0, **MEASURED)
    assert chosen.facts["bits_per_weight"] <= 7.0
    assert 0 < len(chosen.facts["high"]) < len(targets.chosen(describe(folder), resolve("Rtn").Params()))
    made = _run("Gptq", chosen.out, tmp_path / "q", **MEASURED)
    bits = {row["name"]: row["bits"] for row in made.facts["layers"]}
    assert {name for name, each in bits.items() if each == 8} == set(chosen.facts["high"])
    for prefix in ("model.layers.0", "model.layers.1"):
        assert len({bits[f"{prefix}.self_attn.{kind}_proj"] for kind in "qkv"}) == 1
    stored = load_file(made.out / "model.safetensors")
    parts = (".qweight", ".scales", ".qzeros")
    assert chosen.facts["bytes"] == sum(
        value.numel() * value.element_size() for name, value in stored.items() if name.endswith(parts)
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"algorithm": "k_quant_mixed", "size": 0.4}, "is a rule"),
        ({"data_config": "train"}, "takes one budget"),
        ({"data_config": "train", "size": 0.4, "ratio": 0.5}, "takes one budget"),
        ({"size": 0.4}, "nothing to calibrate on"),
        ({"data_config": "train", "bits_per_weight": 3}, "bits there are"),
        ({"data_config": "train", "size": 0.4, "group_sizes": [24]}, "no block of any kernel"),
        ({"data_config": "train", "size": 0.4, "fallback": True}, "makes no integers"),
        ({"algorithm": "k_quant_last", "high_group_size": 48}, "no block of any kernel"),
    ],
)
def test_what_a_plan_refuses(tmp_path: Path, params: dict[str, object], message: str) -> None:
    technique = resolve("SelectiveMixedPrecision")
    accelerator = Accelerator(device="cpu", execution_providers=("CPUExecutionProvider",))
    given = technique.Params.model_validate(params)
    found = technique().check(describe(tiny_llama(tmp_path / "m")), given, probe(), accelerator)
    assert any(message in problem.message for problem in found if problem.severity is Severity.ERROR)


def test_a_failing_gate_names_the_edits_that_help(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", initializer_range=0.2)
    prompts = [[11, 52, 97, 200, 33, 64, 120, 7]]
    model = Artifact(kind=Kind.HF, path=folder, digest="0" * 64)

    def gate(made: PassContext, kl: float) -> None:
        quantised.check(model, made.out, {"kl": kl, "top1": 0.0}, ParityGate(), made, prompts, None)

    coarse = _run("Rtn", folder, tmp_path / "a", group_size=64)
    with pytest.raises(PassFailed) as raised:
        gate(coarse, 1e-9)
    (problem,) = raised.value.problems
    places = [
        str(problem.fix).index(text) for text in ('"*.down_proj": {"bits": 8}', '"group_size": 32', "Gptq")
    ]
    assert places == sorted(places)
    assert '"fallback": true' in str(problem.fix)
    assert "lm_head" not in str(problem.fix)  # it stayed in floating point
    finest = _run("Gptq", folder, tmp_path / "b", bits=8, **MEASURED)
    assert "SelectiveMixedPrecision" in advice(finest.facts)
    gate(finest, 1.0)
