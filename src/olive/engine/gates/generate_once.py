"""Load a model folder with onnxruntime-genai and generate once; run as a program in a process of its own.

Standard input is one JSON object ``{"folder", "ids", "new_tokens"}``; the last line of standard output is
another, ``{"text", "ids", "seconds", "load_seconds"}``. It imports nothing of this
package: what it shows is that the folder works for someone who has only the runtime.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter
from typing import Any


def generate(folder: str, ids: list[int], new_tokens: int) -> dict[str, Any]:
    """Greedy continuation of ``ids`` by at most ``new_tokens`` tokens."""
    import onnxruntime_genai as og

    start = perf_counter()
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    loaded = perf_counter()
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ids) + new_tokens, batch_size=1)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    made: list[int] = []
    while not generator.is_done() and len(made) < new_tokens:
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    return {
        "text": tokenizer.decode(made),
        "ids": made,
        "load_seconds": loaded - start,
        "seconds": perf_counter() - loaded,
    }


if __name__ == "__main__":
    request = json.load(sys.stdin)
    sys.stdout.write(
        "\n" + json.dumps(generate(request["folder"], request["ids"], request["new_tokens"])) + "\n"
    )
