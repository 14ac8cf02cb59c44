from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import DOCUMENT_C, PASSES, load_document

from olive.config import docs
from olive.config.schema import schema
from olive.config.workflow import Workflow

NAMES = tuple(PASSES)
ROOT = Path(__file__).parents[2]


def found() -> dict[str, Any]:
    return schema(lambda name: PASSES[name], NAMES)


def test_schema_has_every_section_and_pass() -> None:
    document = found()
    assert set(document["properties"]) == set(Workflow.model_fields) | {"$schema"}
    assert document["additionalProperties"] is False
    for name, params in PASSES.items():
        definition = document["$defs"][f"pass.{name}"]
        assert set(definition["properties"]) == {"type", "host", "evaluator", *params.model_fields}
        assert definition["additionalProperties"] is False
    arguments = document["$defs"]["pass.LoRA"]["properties"]["training_args"]["properties"]
    assert arguments["max_steps"] == {"type": "integer"}
    assert "steps" in arguments["eval_strategy"]["enum"]


def test_every_reference_of_the_schema_resolves() -> None:
    document = found()
    text = json.dumps(document)
    for part in text.split('"$ref": "#/$defs/')[1:]:
        assert part.split('"')[0] in document["$defs"]


def test_schema_accepts_what_the_loader_accepts() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(found())
    assert list(validator.iter_errors(DOCUMENT_C)) == []
    wrong = json.loads(json.dumps(DOCUMENT_C))
    wrong["passes"]["lora"]["lora_rr"] = 1
    assert list(validator.iter_errors(wrong))


def test_a_document_may_name_its_schema() -> None:
    loaded = load_document({"$schema": "docs/olive-config.schema.json", **DOCUMENT_C})
    assert loaded.findings == ()
    assert loaded.document == DOCUMENT_C


def test_reference_names_every_field() -> None:
    page = docs.reference(lambda name: PASSES[name], NAMES)
    for _, _, model in docs._SECTIONS:
        for name, field in model.model_fields.items():
            assert f"| `{name}` |" in page
            assert field.description, f"{model.__name__}.{name} has no description"
    for params in PASSES.values():
        assert all(f"| `{name}` |" in page for name in params.model_fields)
    assert "| `lora_r` | `r` |" in page


def test_main_writes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table_of_passes.py"
    table.write_text(
        "from olive.config.base import PassParams\n"
        "class Nothing(PassParams):\n    '''Does nothing.'''\n"
        "def names():\n    return ('Nothing',)\n"
        "def params_of(name):\n    return Nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert docs.main(["table_of_passes", str(tmp_path / "docs")]) == 0
    assert "### `Nothing`" in (tmp_path / "docs/config.md").read_text()
    json.loads((tmp_path / "docs/olive-config.schema.json").read_text())
    assert docs.main([]) == 2


def test_the_published_files_are_current(tmp_path: Path) -> None:
    from olive.passes.registry import names, params_of

    hint = "run: python -m olive.config.docs olive.passes.registry docs"
    assert (ROOT / "docs/config.md").read_text() == docs.reference(params_of, names()), hint
    published = json.loads((ROOT / "docs/olive-config.schema.json").read_text())
    assert published == schema(params_of, names()), hint


def test_loading_is_quick_and_light(tmp_path: Path) -> None:
    """Under a second, interpreter and imports included, and without a heavy library."""
    (tmp_path / "c.json").write_text(json.dumps(DOCUMENT_C))
    code = (
        "import sys, time\n"
        "began = time.process_time()\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from documents import load_document\n"
        f"load_document({str(tmp_path / 'c.json')!r})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'onnx', 'onnxruntime', 'pandas', 'peft'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time() - began)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0
