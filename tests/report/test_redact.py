"""What counts as a secret, and what only looks like one."""

from __future__ import annotations

import pytest

from olive.report.redact import HIDDEN, text, tree


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "a" * 34,
        "hf_x1y2z3w4",
        "ghp_" + "A1" * 18,
        "github_pat_" + "a1" * 20,
        "sk-proj-" + "a1" * 20,
        "AKIA" + "ABCD1234" * 2,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl",
    ],
)
def test_looks_like_a_secret(secret: str) -> None:
    assert secret not in text(f"before {secret} after")
    assert text(f"before {secret} after") == f"before {HIDDEN} after"


@pytest.mark.parametrize(
    "words",
    [
        "`hf_config.model_name` is now `model_path`",
        "hf_config and hf_token",
        "max_new_tokens=8, prompt_tokens: 64, tokens/s",
        "secrets are references",
        "https://example.org/a/b?c=d",
        "passes.lora.training_args.learning_rate",
        "token: true",
        "set api_key=$MY_KEY",
    ],
)
def test_is_no_secret(words: str) -> None:
    assert text(words) == words


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "hf_token",
        "access_token",
        "password",
        "client_secret",
        "api_key",
        "AccountKey",
        "account-key",
    ],
)
def test_key_names(name: str) -> None:
    assert tree({name: "correct horse"}) == {name: HIDDEN}
    assert tree({"outer": {name: ["correct horse"]}}) == {"outer": {name: [HIDDEN]}}


@pytest.mark.parametrize(
    "name", ["eos_token", "pad_token", "max_new_tokens", "tokenizer", "tokens", "secretary", "password_hint"]
)
def test_other_names(name: str) -> None:
    assert tree({name: "correct horse"}) == {name: "correct horse"}


@pytest.mark.parametrize("reference", ["$HF_TOKEN", "${HF_TOKEN}", "env:HF_TOKEN", "HF_TOKEN"])
def test_references_stay(reference: str) -> None:
    assert tree({"token": reference}) == {"token": reference}


def test_account_key_in_a_connection_string() -> None:
    assert text("AccountName=a;AccountKey=abc123==;Suffix=b") == f"AccountName=a;AccountKey={HIDDEN};Suffix=b"
    assert text("https://h/x?sv=1&sig=abc%3D&y=1") == f"https://h/x?sv=1&sig={HIDDEN}&y=1"
