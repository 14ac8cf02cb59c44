import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from olive.config.workflow import PreProcess
from olive.data.template import Text
from olive.data.tokens import IGNORE, LightTokenizer, load
from olive.errors import ConfigError
from tiny import tiny_tokenizer

ALL, COMPLETION = PreProcess(), PreProcess(train_on="completion")
SAMPLES = (
    "", "a", " leading", "trailing ", "two  spaces\n\n\nlines", "<s> in the text <|end|>", "naïve ünïcode 漢字 🙂",  # noqa: E501
    "<|user|>\nHi<|end|>\n<|assistant|>\n", "12345 0x7f", "\u2028\u00a0\ttab", "<extra> <pad>",
)  # fmt: skip


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def post_process(folder: Path, single: str) -> Path:
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(name, backend.token_to_id(name)) for name in ("<s>", "<|end|>")]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=special)
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def plain(folder: Path) -> Path:
    return tiny_tokenizer(folder)


def adds_bos(folder: Path) -> Path:
    return edit(post_process(tiny_tokenizer(folder), "<s> $A"), bos_token="<s>")


def adds_both(folder: Path) -> Path:
    return edit(post_process(tiny_tokenizer(folder), "<s> $A <|end|>"), bos_token="<s>")


# The two flags beside a tokenizer.json: the file's post-processor wins, as in transformers 5.
def flag(folder: Path) -> Path:
    return edit(tiny_tokenizer(folder), bos_token="<s>", add_bos_token=True)


def flag_off(folder: Path) -> Path:
    return edit(post_process(tiny_tokenizer(folder), "<s> $A"), bos_token="<s>", add_bos_token=False)


def bos_not_added(folder: Path) -> Path:
    return edit(tiny_tokenizer(folder), bos_token="<s>")


def extra_tokens(folder: Path) -> Path:
    entry = {"content": "<extra>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
    tiny_tokenizer(folder, pad=False)
    return edit(
        folder, added_tokens_decoder={"384": entry}, pad_token="<new pad>", additional_special_tokens=["<x>"]
    )


def metaspace(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tiny_tokenizer(folder)
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "<pad>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = ["the tone is joy", "sadness and fear", "joy of a tone"]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    )
    saved = json.loads(backend.to_str())
    saved["added_tokens"] = saved["added_tokens"][:4]  # byte tokens are plain vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return folder


FOLDERS: list[Callable[[Path], Path]] = [
    plain, adds_bos, adds_both, flag, flag_off, bos_not_added, extra_tokens, metaspace
]  # fmt: skip


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("tokenizer"))


def test_ids_equal_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load(folder)
    for text in SAMPLES:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=True) == theirs(text)["input_ids"]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert ours.vocab_size == len(theirs)
    check = theirs("a")["input_ids"]
    assert ours.adds_bos == (theirs.bos_token_id is not None and check[0] == theirs.bos_token_id)


def test_a_row_begins_and_ends_once(folder: Path) -> None:
    tokenizer = load(folder)
    for pre in (ALL, COMPLETION):
        for completion in ("joy", "joy<|end|>", ""):
            encoded = tokenizer.encode_row(Text("the tone is:\n", completion, "joy"), pre)
            ids = encoded.ids
            assert ids[-1] == tokenizer.eos_id
            assert ids.count(tokenizer.eos_id) == 1
            assert (ids[0] == tokenizer.bos_id) == tokenizer.adds_bos
            assert encoded.labels[-1] == tokenizer.eos_id  # a real EOS is learnt, whatever the pad token is
    bare = PreProcess(add_special_tokens=False)
    assert tokenizer.encode_row(Text("", "a joy", ""), bare).ids == tokenizer.encode("a joy")


def test_a_bos_in_the_text_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = load(adds_bos(tmp_path))
    for pre in (ALL, COMPLETION):
        for text in (Text("<s>the ", "joy", "joy"), Text("", "<s>joy", "joy")):
            assert tokenizer.encode_row(text, pre).ids.count(tokenizer.bos_id) == 1


def test_a_tokenizer_without_bos_never_writes_one(tmp_path: Path) -> None:
    tokenizer = load(plain(tmp_path))
    assert tokenizer.bos_id is None
    assert "None" not in tokenizer.decode(tokenizer.encode_row(Text("", "hello", ""), ALL).ids)


words = st.text(st.sampled_from("abjoy thenrs\nT:é<"), max_size=20)


@given(prompt=words, completion=words)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_prompt_is_what_generation_sees_and_the_text_is_kept(
    folder: Path, prompt: str, completion: str
) -> None:
    tokenizer = load_once(folder)
    text = Text(prompt, completion, completion)
    encoded = tokenizer.encode_row(text, COMPLETION)
    begin = tokenizer.encode_prompt(text, COMPLETION)
    assert encoded.ids[: len(begin)] == begin
    masked = [IGNORE] * len(begin) if prompt else encoded.ids[: len(begin)]
    assert encoded.labels == masked + encoded.ids[len(begin) :]
    assert encoded == tokenizer.encode_rows([text, text], COMPLETION)[1]
    if prompt:
        whole = tokenizer.decode(encoded.ids, skip_special=True)
        assert whole == tokenizer.decode(tokenizer.encode_row(text, ALL).ids, skip_special=True)


_loaded: dict[Path, LightTokenizer] = {}


def load_once(folder: Path) -> LightTokenizer:
    if folder not in _loaded:
        _loaded[folder] = load(folder)
    return _loaded[folder]


def test_a_completion_gets_no_space_that_the_text_lacks(tmp_path: Path) -> None:
    tokenizer = load(metaspace(tmp_path))
    ids = tokenizer.encode_row(Text("the tone is\n", "joy", "joy"), COMPLETION).ids
    assert tokenizer.decode(ids, skip_special=True) == "the tone is\njoy"


def test_chat_template_of_the_folder(tmp_path: Path) -> None:
    one = load(edit(tiny_tokenizer(tmp_path / "a"), chat_template="{{ eos_token }}"))
    assert one.chat is not None
    assert one.chat.render([]) == "<|end|>"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    two = load(edit(tiny_tokenizer(tmp_path / "b"), chat_template=named))
    assert two.chat is not None
    assert two.chat.source == "yes"
    (tmp_path / "a" / "chat_template.jinja").write_text("file")
    assert load(tmp_path / "a").chat.source == "file"  # type: ignore[union-attr]
    assert load(tiny_tokenizer(tmp_path / "c")).chat is None


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a readable tokenizer"):
        load(tmp_path)
    tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match="not JSON"):
        load(tmp_path)


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "the rain"}, {"text": "the match"}]')
    tiny_tokenizer(tmp_path)
    program = f"""
import sys
from pathlib import Path
from olive.config.workflow import DataConfig
from olive.data.plan import preview
load = {{"data_name": "json", "split": "train", "data_files": "a.json"}}
config = DataConfig.model_validate(
    {{"name": "d", "load_dataset_config": load, "pre_process_data_config": {{"strategy": "pack"}}}})
assert preview(config, Path({str(tmp_path)!r}), Path({str(tmp_path)!r})).blocks == 1
heavy = {{"torch", "transformers", "datasets", "pandas", "numpy", "pyarrow", "onnxruntime", "peft"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
