"""Progress: a bar or an occasional line."""

from __future__ import annotations

import io

from olive.passes.base import Progress
from olive.report.progress import LogProgress, RichProgress, fields_text, progress_for


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_few_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = LogProgress(stream, clock)
    progress.start("training", 100)
    for done in range(1, 101):
        clock.now += 1
        progress.update(done, loss=1 / done, tokens_per_second=312.4)
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training ..."
    assert lines[1] == "training 30/100  loss 0.0333  312 tokens/s  1 min 10 s left"
    assert lines[-1] == "training: done in 1 min 40 s"
    assert len(lines) == 5


def test_a_short_task_ends_silently() -> None:
    stream = io.StringIO()
    progress = LogProgress(stream, Clock())
    progress.start("merging")
    progress.update(1)
    progress.finish()
    progress.finish()
    assert stream.getvalue() == "merging ...\n"


def test_a_bar_shows_fields_and_gives_the_terminal_back() -> None:
    stream = io.StringIO()
    progress: Progress = RichProgress(stream, force_terminal=True, width=100)
    progress.start("training [bold]", 10)
    progress.update(5, loss=0.5, tokens_per_second=100.0)
    progress.note("checkpoint [at] 5")
    progress.start("merging")
    progress.update(1)
    progress.finish()
    progress.finish()
    text = stream.getvalue()
    assert "training [bold]" in text
    assert "5/10" in text
    assert "checkpoint [at] 5" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # cursor hidden and shown again


def test_secrets_are_not_shown() -> None:
    stream = io.StringIO()
    LogProgress(stream).note("token hf_" + "a" * 30)
    assert stream.getvalue() == "token [redacted]\n"


def test_choice_by_stream() -> None:
    assert isinstance(progress_for(io.StringIO()), LogProgress)
    assert (
        fields_text({"loss": 0.41234, "tokens_per_second": 1234.6, "epoch": "1/3"})
        == "loss 0.412  1,235 tokens/s  epoch 1/3"
    )
