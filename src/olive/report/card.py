"""README.md of the output: a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

from olive.engine.result import RunResult
from olive.models.artifact import Kind
from olive.report import figures

_LOAD: dict[Kind, str] = {
    Kind.GENAI: 'import onnxruntime_genai as og\nmodel = og.Model("model")\ntokenizer = og.Tokenizer(model)',
    Kind.HF: (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("model")\n'
        'tokenizer = AutoTokenizer.from_pretrained("model")'
    ),
    Kind.ADAPTER: (
        "from peft import AutoPeftModelForCausalLM\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("model")\n'
        "# `model` is the base with the adapter on top"
    ),
    Kind.GGUF: (
        "from llama_cpp import Llama\n"
        'model = Llama("model/model.gguf")\n'
        'print(model("Hello", max_tokens=16)["choices"][0]["text"])'
    ),
    Kind.ONNX: (
        "import onnxruntime\n"
        'session = onnxruntime.InferenceSession("model/model.onnx")\n'
        "print(session.get_inputs())"
    ),
}
_GENERATE = """params = og.GeneratorParams(model)
params.set_search_options(max_length=512)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode({prompt}))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)"""


def load_code(result: RunResult) -> str:
    """Three lines of Python that load ``model/`` from the output folder."""
    kind = result.steps[-1].kind if result.steps else Kind.HF
    files = sorted(path.name for path in (Path(result.output_dir) / "model").glob("*.onnx"))
    return _LOAD[kind].replace("model.onnx", files[0] if kind is Kind.ONNX and files else "model.onnx")


def generate_code(result: RunResult) -> str | None:
    """Python that goes on after :func:`load_code` and streams an answer; None when the model is no bundle."""
    if not result.steps or result.steps[-1].kind is not Kind.GENAI:
        return None
    prompt = result.sample.get("prompt", "") if result.sample else ""
    return _GENERATE.format(prompt=json.dumps(prompt or "Hello", ensure_ascii=False))


def chat_command(result: RunResult) -> str:
    """The shell line that talks to the model from the output folder's parent."""
    return "olive chat ."


def card(result: RunResult) -> str:
    """The model card, in Markdown; ``result`` is redacted already."""
    parts = [f"# {_plain(figures.model_name(result))}", f"{_plain(figures.headline(result))}."]
    parts.append(f"## Load it\n\nIn this folder:\n\n{_fence(load_code(result), 'python')}")
    generate = generate_code(result)
    if generate:
        parts.append(f"Then generate:\n\n{_fence(generate, 'python')}")
        parts.append(f"Or talk to it from the shell:\n\n{_fence(chat_command(result), 'sh')}")
    if result.prompt_template:
        parts.append(
            "It answers prompts of the form it was trained on:\n\n" + _fence(result.prompt_template, "text")
        )
    parts.append(f"## Before and after\n\n{_metrics(result)}")
    parts.append(f"## How it was made\n\n{_steps(result)}")
    if result.sample:
        row = f"{result.sample.get('prompt', '')}{result.sample.get('completion', '')}"
        parts.append(f"One row of the training data, as the model saw it:\n\n{_fence(row, 'text')}")
    gates = _gates(result)
    if gates:
        parts.append(f"Checked between the steps:\n\n{gates}")
    spent = figures.effort(result)
    parts.append(
        f"Made in {figures.duration(spent.took)} on {_plain(_machine(result))}, "
        f"peak memory {figures.size(spent.memory)}. "
        "`run.json` holds the document, versions, seeds and digests; `report.html` shows it all on one page."
    )
    return "\n\n".join(parts) + "\n"


def _machine(result: RunResult) -> str:
    cpu, cores = result.machine.get("cpu"), result.machine.get("cores")
    gpus = [str(gpu.get("name", "")) for gpu in result.machine.get("gpus", []) if isinstance(gpu, dict)]
    text = f"{cores} cores of {cpu}" if cpu and cores else str(cpu or "this machine")
    return f"{text} with {', '.join(gpus)}" if gpus else text


def _metrics(result: RunResult) -> str:
    table = figures.table(result)
    lines = [
        "| | " + " | ".join(_plain(name) for name in table.columns) + " |",
        "|---|" + "---:|" * len(table.columns),
    ]
    for row in table.rows:
        cells = [
            f"{_plain(cell.text)} ({_plain(cell.note)})" if cell.note else _plain(cell.text)
            for cell in row.cells
        ]
        lines.append(f"| {_plain(row.label)} {row.arrow} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n↑ more is better, ↓ less is better."


def _steps(result: RunResult) -> str:
    lines = ["| step | pass | time | peak memory | size |", "|---|---|---:|---:|---:|"]
    for step in result.steps:
        took = figures.duration(step.seconds) + (" (earlier run)" if step.cached else "")
        memory = figures.size(step.peak_memory) if step.peak_memory else "–"
        lines.append(
            f"| {_plain(step.name)} | {_plain(step.type)} | {took} | {memory} | {figures.step_size(step)} |"
        )
    return "\n".join(lines)


def _gates(result: RunResult) -> str:
    lines = []
    for step in result.steps:
        for gate in step.gates:
            shown = [
                f"{item.label} {item.value}" + (f" ({item.limit})" if item.limit else "")
                for item in figures.gate_figures(gate)
            ]
            said = "; ".join(_plain(part) for part in [*shown, gate.text] if part)
            verdict = "passed" if gate.passed else "FAILED"
            lines.append(f"- {gate.gate} gate after {_plain(step.name)}: {verdict}. {said}")
    return "\n".join(line.rstrip() for line in lines)


def _plain(text: str) -> str:
    """``text`` as inline Markdown that renders literally, on one line."""
    return re.sub(r"([\\`*\[\]<>|#~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _fence(code: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"
