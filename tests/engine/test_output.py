"""The output folder is ours alone."""

from __future__ import annotations

from pathlib import Path

from olive.engine.output import check_output


def test_an_empty_or_missing_folder_is_accepted(tmp_path: Path) -> None:
    assert list(check_output(tmp_path / "new", tmp_path / "cache")) == []
    (tmp_path / "empty").mkdir()
    assert list(check_output(tmp_path / "empty", tmp_path / "cache")) == []


def test_foreign_files_are_refused_and_kept(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.docx"
    thesis.write_text("years of work")
    problems = list(check_output(tmp_path, tmp_path / "cache"))
    assert len(problems) == 1
    assert "thesis.docx" in problems[0].message
    assert thesis.read_text() == "years of work"


def test_a_readme_without_a_run_of_ours_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert len(list(check_output(tmp_path, tmp_path / "cache"))) == 1


def test_our_own_earlier_result_is_accepted(tmp_path: Path) -> None:
    for name in ("run.json", "README.md", "report.html"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model").mkdir()
    assert list(check_output(tmp_path, tmp_path / "cache")) == []


def test_the_cache_may_lie_inside(tmp_path: Path) -> None:
    (tmp_path / "deep" / "cache").mkdir(parents=True)
    assert list(check_output(tmp_path, tmp_path / "deep" / "cache")) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("x")
    assert "is a file" in next(iter(check_output(path, tmp_path))).message
