"""Perplexity: exp of the mean negative log-likelihood of the tokens that the data config trains on."""

from __future__ import annotations

from math import exp, log

from olive.config.workflow import Metric
from olive.data import blocks
from olive.errors import ConfigError, PassFailed
from olive.evaluation.runners.base import Document
from olive.evaluation.session import Measured, Session
from olive.evaluation.statistics import half_width_of_ratio


def measure(metric: Metric, session: Session) -> dict[str, Measured]:
    """Perplexity over the blocks of the data config; a document's first token is given, not predicted.

    Documents packed into one block are measured apart, each with its own context.

    Raises:
        ConfigError: no token counts, or a block is longer than the model's context.
        PassFailed: the model's probabilities are no numbers.
    """
    documents = _documents(metric, session)
    longest = max(len(document.ids) for document in documents)
    if session.runner.context_length and longest > session.runner.context_length:
        raise ConfigError(
            f"metric {metric.name!r}: a block of {longest} tokens is beyond the model's context of "
            f"{session.runner.context_length}",
            where=f"data config {metric.data_config}",
            fix=f"Set max_seq_len to {session.runner.context_length} or less.",
        )
    session.progress.start(f"evaluate {metric.name}", len(documents))
    losses = session.runner.losses(documents, session.progress.update)
    session.progress.finish()
    counts = [document.counted for document in documents]
    mean = sum(losses) / sum(counts)
    if not mean < log(1e300):
        raise PassFailed(
            f"metric {metric.name!r}: the mean loss is {mean}",
            fix="The model gives no usable probabilities; check the step that made it.",
        )
    value = exp(mean)
    half = half_width_of_ratio(losses, counts)
    return {"perplexity": Measured(value, sum(counts), None if half is None else value * half)}


def _documents(metric: Metric, session: Session) -> list[Document]:
    pre = session.config(metric).pre_process_data_config
    built = blocks.build(session.rows(metric), pre, session.tokenizer, pre.random_seed or 0)
    documents: list[Document] = []
    for block in built.blocks:
        start = 0
        for length in block.lengths:
            part = slice(start, start + length)
            documents.append(Document(tuple(block.ids[part]), tuple(block.labels[part])))
            start += length
    documents = [document for document in documents if document.counted]
    if not documents:
        raise ConfigError(
            f"metric {metric.name!r}: no token of its data has a token before it to be predicted from",
            where=f"data config {metric.data_config}",
        )
    return documents
