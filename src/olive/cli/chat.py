"""``olive chat``: talk to the model in an output folder."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.cli.arguments import Parser, count

if TYPE_CHECKING:
    from olive.data.tokens import LightTokenizer


def configure_chat(parser: Parser) -> None:
    """What ``olive chat`` takes."""
    parser.add_argument("output", metavar="OUTPUT", help="the output folder of a run, or a model folder")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="answer this and exit; once for each field of the document's template",
    )
    parser.add_argument(
        "--max-new-tokens", type=count, default=256, metavar="N", help="longest answer (default 256)"
    )


def chat(args: argparse.Namespace) -> int:
    """Answer ``--prompt``, or whatever is typed until end of file."""
    from olive.errors import ConfigError
    from olive.models.genai import GenaiModel

    folder, facts = find(Path(args.output))
    talk = Talk.of(folder, facts)
    if args.prompt and len(args.prompt) != len(talk.fields):
        raise ConfigError(
            f"{len(args.prompt)} texts were given, and the template has the fields {', '.join(talk.fields)}",
            fix="Give --prompt once for each field, in this order.",
        )
    if args.prompt is None and sys.stdin.isatty():
        print(f"{folder}: {talk.form}. Ctrl-D ends.", file=sys.stderr)
    model = GenaiModel(folder)
    room = model.context_length or args.max_new_tokens + 1
    while (values := args.prompt or _ask(talk.fields)) is not None:
        ids = talk.prompt_ids(values)
        limit = max(1, min(args.max_new_tokens, room - len(ids)))
        answer = talk.tokenizer.decode(model.generate_batch([ids], limit)[0], skip_special=True).strip()
        print(answer, flush=True)
        if args.prompt:
            break
        talk.heard(values, answer)
    return 0


def find(output: Path) -> tuple[Path, dict[str, Any]]:
    """The model folder, and the facts of run.json where there is one.

    Raises:
        ConfigError: there is no GenAI model.
    """
    from olive.errors import ConfigError

    facts: dict[str, Any] = {}
    for folder, run in ((output / "model", output / "run.json"), (output, output.parent / "run.json")):
        if (folder / "genai_config.json").is_file():
            if run.is_file():
                try:
                    facts = json.loads(run.read_text(encoding="utf-8"))
                except ValueError as error:
                    raise ConfigError(f"{run} is no JSON: {error}", fix="Run the document again.") from error
            return folder, facts
    if not output.exists():
        raise ConfigError(f"there is no folder {output}", fix="Name the output_dir of a finished run.")
    raise ConfigError(
        f"{output} holds no model that onnxruntime-genai loads",
        fix="End the document's passes with ModelBuilder, run it, and name its output_dir.",
    )


@dataclass(slots=True)
class Talk:
    """How words become a prompt: the document's template, else the model's chat template, else as they are.

    Attributes:
        tokenizer: of the model.
        template: the document's text before the answer, or None.
        fields: what to ask for.
        turns: the conversation so far, for a chat template.
    """

    tokenizer: LightTokenizer
    template: str | None
    fields: list[str]
    turns: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, facts: dict[str, Any]) -> Talk:
        """From a model folder and what run.json says."""
        from olive.data.template import fields
        from olive.data.tokens import load

        template = facts.get("prompt_template")
        asked = fields(template) if isinstance(template, str) else []
        return cls(load(folder), template if asked else None, asked or ["prompt"])

    @property
    def form(self) -> str:
        """What the words are put into, for people."""
        if self.template is not None:
            return f"the document's template {self.template!r}"
        return "the model's chat template" if self.tokenizer.chat else "plain text, continued"

    def prompt_ids(self, values: list[str]) -> list[int]:
        """Token ids of the prompt, made as they were made for training."""
        from olive.config.workflow import PreProcess
        from olive.data.template import render

        if self.template is not None:
            # What is asked for is everything before the last field: one more field stands for the answer.
            answer = "answer" + "_" * max(map(len, self.fields))
            pre = PreProcess(text_template=f"{self.template}{{{answer}}}")
            row = dict(zip(self.fields, values, strict=True)) | {answer: "?"}
            return self.tokenizer.encode_prompt(render(pre, row), pre)
        if self.tokenizer.chat is not None:
            turns = [*self.turns, {"role": "user", "content": values[0]}]
            return self.tokenizer.encode(self.tokenizer.chat.render(turns, add_generation_prompt=True))
        return self.tokenizer.encode(values[0], special=True)

    def heard(self, values: list[str], answer: str) -> None:
        """Remember one exchange; a document's template has no memory."""
        if self.template is None:
            self.turns += [{"role": "user", "content": values[0]}, {"role": "assistant", "content": answer}]


def _ask(fields: list[str]) -> list[str] | None:
    """One line for each field; None at the end of input. Empty lines are asked again."""
    values = []
    for name in fields:
        value = ""
        while not value.strip():
            try:
                value = input(f"{name}> " if sys.stdin.isatty() else "")
            except EOFError:
                return None
        values.append(value)
    return values
