"""Our integers as GGUF: read by this product, by the gguf package and by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from olive.config.gates import IntegersGate, ParityGate
from olive.config.workflow import Accelerator
from olive.engine.gates import integers, parity
from olive.errors import PassFailed
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.models.foreign.gguf_folder import unfolded
from olive.models.hf import describe, load_model, load_tokenizer
from olive.passes.base import PassContext
from olive.passes.registry import resolve
from tiny import TEXTS, tiny_llama, tiny_phi3
from training_kit import context, data, rows

PROMPTS = [[11, 52, 97, 200, 33, 64, 120, 7], [9, 250, 31, 77]]


def artifact(folder: Path) -> Artifact:
    return Artifact(kind=Kind.HF, path=folder, digest="0" * 64)


def run(name: str, source: Path, folder: Path, **params: Any) -> PassContext:
    folder.mkdir(parents=True, exist_ok=True)
    technique = resolve(name)
    ctx = context(folder, data(rows(folder)))
    technique().run(artifact(source), technique.Params.model_validate(params), ctx)
    technique().ensure(ctx.out)
    return ctx


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), initializer_range=0.2, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi3(tmp_path_factory.mktemp("phi3"), initializer_range=0.2)


@pytest.mark.parametrize(
    ("family", "params", "kind"),
    [
        ("llama", {}, "Q4_1"),
        ("llama", {"sym": True}, "Q4_0"),
        ("llama", {"bits": 8, "sym": True}, "Q8_0"),
        ("llama", {"group_size": 64}, "Q4_1"),
        ("llama", {"group_size": -1, "sym": True}, "Q4_0"),
        ("llama", {"bits": 2}, "Q4_1"),
        ("llama", {"bits": 2, "sym": True}, "Q4_0"),
        ("phi3", {}, "Q4_1"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_integers_come_back_and_others_compute_the_same(
    family: str, params: dict[str, Any], kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ours = run("Rtn", request.getfixturevalue(family), tmp_path / "ours", **params)
    ctx = run("SaveGguf", ours.out, tmp_path, float_dtype="float32")
    assert ctx.facts["types"][kind] == (14 if family == "llama" else 8)
    held = integers.check(artifact(ours.out), ctx.out, IntegersGate(), ctx)
    assert held.figures["layers"] == ctx.facts["types"][kind]
    assert parity.check(artifact(ours.out), ctx.out, ParityGate(), ctx, PROMPTS).figures["kl"] < 1e-4
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ctx.out / "model.gguf", alone)
    theirs = AutoModelForCausalLM.from_pretrained(alone, gguf_file="model.gguf", dtype=torch.float32)
    own = load_model(unfolded(alone / "model.gguf", tmp_path / "cache"), dtype="float32")
    with torch.no_grad():
        one, other = (model(torch.tensor([PROMPTS[0]])).logits for model in (theirs, own))
    # Q4_1 holds the zero point as a minimum in float16: 1/2048 of up to 15 steps
    assert float((one - other).abs().max()) < (2e-2 if kind == "Q4_1" else 1e-4) * float(one.std())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_floating_point(llama: Path, tmp_path: Path, dtype: str) -> None:
    ctx = run("SaveGguf", llama, tmp_path, float_dtype=dtype)
    assert set(ctx.facts["types"]) == {"F16" if dtype == "float16" else "BF16", "F32"}
    assert integers.check(artifact(llama), ctx.out, IntegersGate(), ctx).figures["layers"] == 0
    named = {one.name: one for one in gguf.GGUFReader(ctx.out / "model.gguf").tensors}
    assert named["blk.1.ffn_norm.weight"].tensor_type.name == "F32"


def test_what_has_no_form_is_expanded_and_told(llama: Path, tmp_path: Path) -> None:
    ours = run("Rtn", llama, tmp_path / "ours", overrides={"*.down_proj": {"bits": 8}})
    ctx = run("SaveGguf", ours.out, tmp_path)
    assert ctx.facts["expanded"] == [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    assert "down_proj" in ctx.progress.notes[0]  # type: ignore[attr-defined]
    assert integers.check(artifact(ours.out), ctx.out, IntegersGate(), ctx).figures["layers"] == 12


def test_a_shared_head_is_the_embedding(phi3: Path, tmp_path: Path) -> None:
    ours = run("Rtn", phi3, tmp_path / "ours", lm_head=True)
    ctx = run("SaveGguf", ours.out, tmp_path)
    named = {one.name: one for one in gguf.GGUFReader(ctx.out / "model.gguf").tensors}
    assert "output.weight" not in named
    assert named["token_embd.weight"].tensor_type.name == "Q4_1"
    assert integers.check(artifact(ours.out), ctx.out, IntegersGate(), ctx).figures["layers"] == 9


def test_the_tokenizer_travels(llama: Path, tmp_path: Path) -> None:
    """With its template and special tokens; transformers' own conversion gives the same ids."""
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    shutil.copytree(llama, source)
    path = source / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    ctx = run("SaveGguf", source, tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ctx.out / "model.gguf", alone)
    theirs = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
    own, given = load_tokenizer(unfolded(alone, tmp_path / "cache")), load_tokenizer(source)
    for text in TEXTS:
        assert theirs(text).input_ids == own(text).input_ids == given(text).input_ids
    assert own.chat_template == template
    assert own.eos_token == given.eos_token == "<|end|>"


def test_sentence_pieces_travel(llama: Path, tmp_path: Path) -> None:
    """A tokenizer with byte fallback, as Llama 2 and Phi-3 have: merges become scores and merges again."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    source = tmp_path / "source"
    shutil.copytree(llama, source)
    count = json.loads((llama / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=count, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    body = json.loads(tokenizer.to_str())
    body["added_tokens"] = body["added_tokens"][:3]  # the bytes are ordinary tokens, as in Llama 2's file
    (source / "tokenizer.json").write_text(json.dumps(body))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>"}))
    ctx = run("SaveGguf", source, tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ctx.out / "model.gguf", alone)
    given = Tokenizer.from_file(str(source / "tokenizer.json"))
    own = Tokenizer.from_file(str(unfolded(alone, tmp_path / "cache") / "tokenizer.json"))
    for text in (*TEXTS, "the rain  é 日本 we"):
        assert own.encode(text).ids == given.encode(text).ids
        assert own.decode(own.encode(text).ids) == given.decode(given.encode(text).ids)


def test_what_has_no_place_is_refused(llama: Path, tmp_path: Path) -> None:
    technique = resolve("SaveGguf")
    params = technique.Params.model_validate({})
    info = describe(llama)
    accelerator = Accelerator(device="cpu", execution_providers=("CPUExecutionProvider",))
    other = info.model_copy(update={"config": info.config | {"model_type": "gemma2"}})
    assert "gemma2" in next(iter(technique().check(other, params, probe(), accelerator))).message
    scaled = info.model_copy(update={"config": info.config | {"rope_scaling": {"rope_type": "yarn"}}})
    assert "yarn" in next(iter(technique().check(scaled, params, probe(), accelerator))).message
    rtn = resolve("Rtn").Params.model_validate({"bits": 8})
    assert "no form in GGUF" in next(iter(technique().check_settings(params, rtn))).message
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    body = json.loads((source / "tokenizer.json").read_text())
    body["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(PassFailed, match="splits text by rules"):
        run("SaveGguf", source, tmp_path)
