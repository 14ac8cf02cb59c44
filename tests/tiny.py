"""Tiny random models and tokenizers for tests: a full Hugging Face folder in well under a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<unk>", "<s>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>")
TEXTS = (
    "### Text: the rain would not stop and I missed you all day\n### The tone is:\nsadness",
    "### Text: we won the match and danced in the street\n### The tone is:\njoy",
    "### Text: something moved behind the door and I could not breathe\n### The tone is:\nfear",
    "### Text: nobody told me the whole family would be there\n### The tone is:\nsurprise",
    "<|user|>\nplease read 123 lines, quickly<|end|>\n<|assistant|>\nyes<|end|>",
)


def tiny_tokenizer(
    folder: Path, *, vocab_size: int = 384, pad: bool = True, chat_template: str | None = None
) -> Path:
    """Write a byte-level BPE tokenizer that adds no BOS; eos is ``<|end|>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": "<|end|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    if pad:
        config["pad_token"] = "<pad>"
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def tiny_phi3(folder: Path, *, layers: int = 2, hidden: int = 64, seed: int = 0, **overrides: Any) -> Path:
    """Write a random Phi-3 in float32 with its tokenizer; ``overrides`` go to ``Phi3Config``."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return _write(Phi3Config, Phi3ForCausalLM, folder, layers, hidden, seed, overrides)


def tiny_llama(folder: Path, *, layers: int = 2, hidden: int = 64, seed: int = 0, **overrides: Any) -> Path:
    """Write a random Llama in float32 with its tokenizer; ``overrides`` go to ``LlamaConfig``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _write(LlamaConfig, LlamaForCausalLM, folder, layers, hidden, seed, overrides)


def _write(
    config_type: Any,
    model_type: Any,
    folder: Path,
    layers: int,
    hidden: int,
    seed: int,
    overrides: dict[str, Any],
) -> Path:
    import torch

    tiny_tokenizer(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": vocabulary["<|end|>"],
        "pad_token_id": vocabulary["<pad>"],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    if config_type.model_type == "phi3":
        settings["original_max_position_embeddings"] = 512
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_type(config_type(**(settings | overrides))).eval()
    model.save_pretrained(folder)
    return folder
