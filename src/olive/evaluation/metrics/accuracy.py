"""Accuracy of generated answers against a label set; an answer that is no label counts as wrong."""

from __future__ import annotations

from collections.abc import Sequence

from olive.config.workflow import Metric
from olive.data import template
from olive.data.tokens import LightTokenizer
from olive.errors import ConfigError
from olive.evaluation.runners.base import by_length
from olive.evaluation.session import Measured, Session
from olive.evaluation.statistics import half_width_of_share


def measure(metric: Metric, session: Session) -> dict[str, Measured]:
    """Generate every answer and compare: ``accuracy_score``, ``f1_score`` (macro) and ``exact_match``.

    An answer is the generated text up to the end token or the first line end, stripped. It must be the
    label alone: "joy, I think" is no "joy".

    Raises:
        ConfigError: the data has no answers, or answers outside ``labels``.
    """
    pre = session.config(metric).pre_process_data_config
    texts = template.render_all(pre, session.rows(metric), session.tokenizer.chat)
    answers = [text.answer.strip() for text in texts]
    labels = _labels(metric, answers)
    prompts = [session.tokenizer.encode_prompt(text, pre) for text in texts]
    predictions = generate(metric, session, prompts, one_line=not any("\n" in answer for answer in answers))
    return _scores(predictions, answers, labels)


def generate(
    metric: Metric, session: Session, prompts: Sequence[Sequence[int]], *, one_line: bool
) -> list[str]:
    """The answer to each prompt, in the order of ``prompts``."""
    runner, tokenizer = session.runner, session.tokenizer
    _check_prompts(metric, prompts, runner.context_length)
    stops = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    if one_line:
        stops |= line_ends(tokenizer)
    found = [""] * len(prompts)
    done = 0
    session.progress.start(f"evaluate {metric.name}", len(prompts))
    lengths = [len(prompt) for prompt in prompts]
    for batch in by_length(lengths, rows=metric.batch_size, tokens=metric.batch_size * max(lengths)):
        texts = runner.generate([prompts[index] for index in batch], metric.max_new_tokens, stops)
        for index, ids in zip(batch, texts, strict=True):
            text = tokenizer.decode(ids, skip_special=True)
            found[index] = (text.split("\n", 1)[0] if one_line else text).strip()
        done += len(batch)
        session.progress.update(done)
    session.progress.finish()
    return found


def line_ends(tokenizer: LightTokenizer) -> frozenset[int]:
    """Tokens that begin with a line end; one that ends with it, after a full stop say, is still answer."""
    found = set()
    for token in range(tokenizer.vocab_size):
        head, newline, _ = tokenizer.decode([token]).partition("\n")
        if newline and not head.strip():
            found.add(token)
    return frozenset(found)


def _labels(metric: Metric, answers: Sequence[str]) -> list[str]:
    distinct = sorted(set(answers))
    if "" in distinct:
        raise ConfigError(
            f"metric {metric.name!r}: {answers.count('')} of {len(answers)} rows have no answer",
            where=f"data config {metric.data_config}",
            fix="Give it a text_template whose last field is the answer, and rows that have one.",
        )
    if not metric.labels:
        return distinct
    labels = list(dict.fromkeys(label.strip() for label in metric.labels))
    foreign = [answer for answer in distinct if answer not in labels]
    if foreign:
        raise ConfigError(
            f"metric {metric.name!r}: {sum(answer in foreign for answer in answers)} rows have answers "
            f"outside its labels: {', '.join(map(repr, foreign[:8]))}",
            fix=f"labels are {', '.join(labels)}; add the missing ones or drop the rows",
        )
    return labels


def _check_prompts(metric: Metric, prompts: Sequence[Sequence[int]], context: int) -> None:
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(
                f"metric {metric.name!r}: row {row} has an empty prompt",
                fix="Put some text before the template's last field.",
            )
        if context and len(prompt) + metric.max_new_tokens > context:
            raise ConfigError(
                f"metric {metric.name!r}: row {row} has {len(prompt)} tokens; with {metric.max_new_tokens} "
                f"new ones that is beyond the model's context of {context}",
                fix="Shorten the row or lower max_new_tokens.",
            )


def _scores(predictions: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> dict[str, Measured]:
    import torch
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    number = {label: index for index, label in enumerate(labels)}
    other = len(labels)  # the class of every text that is no label
    predicted = torch.tensor([number.get(text, other) for text in predictions])
    expected = torch.tensor([number[text] for text in answers])
    accuracy = float(multiclass_accuracy(predicted, expected, num_classes=other + 1, average="micro"))
    each = multiclass_f1_score(predicted, expected, num_classes=other + 1, average=None)
    seen = [index for index in range(other) if bool(((predicted == index) | (expected == index)).any())]
    count = len(answers)
    exact = sum(map(str.__eq__, predictions, answers)) / count
    return {
        "accuracy_score": Measured(accuracy, count, half_width_of_share(accuracy, count)),
        "f1_score": Measured(float(each[seen].mean()), count),
        "exact_match": Measured(exact, count, half_width_of_share(exact, count)),
    }
