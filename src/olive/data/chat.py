"""Chat templates, rendered as transformers renders them, in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from olive.errors import ConfigError

# Characters that no text holds (Unicode noncharacters): where a {% generation %} block begins and ends.
BEGIN, END = "\ufdd0", "\ufdd1"
_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens it may name.

    Attributes:
        source: the template.
        tokens: such as ``{"bos_token": "<s>", "eos_token": "</s>"}``.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def marks(self) -> bool:
        """Whether the template itself marks the assistant's words, with ``{% generation %}``."""
        return _MARKED.search(self.source) is not None

    def render(
        self,
        turns: Iterable[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        marked: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
            turns: role, content and whatever else the template reads.
            add_generation_prompt: end with what comes before an answer.
            marked: put ``BEGIN`` and ``END`` around what stands in ``{% generation %}``.

        Raises:
            ConfigError: the template does not parse, refuses the turns, or does what the sandbox forbids.
        """
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        try:
            return str(
                _compile(self.source, marked).render(
                    messages=list(turns), add_generation_prompt=add_generation_prompt, **self.tokens
                )
            )
        except SecurityError as error:
            raise ConfigError(f"the chat template does what a template may not: {error}") from error
        except (TemplateError, TypeError) as error:
            raise ConfigError(f"the chat template does not render: {error}") from error


@lru_cache(maxsize=16)
def _compile(source: str, marked: bool = False) -> Any:
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """``{% generation %}``, which marks the assistant's words: rendered as its content."""

        tags = {"generation"}  # jinja2 declares it as an instance attribute

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marked:
                first, last = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END))
                body = [first, *body, last]
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


PLAIN = ChatTemplate(
    "{% for turn in messages %}### {{ turn.role | capitalize }}:\n{{ turn.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""How chat turns are written for a model without a chat template of its own."""
