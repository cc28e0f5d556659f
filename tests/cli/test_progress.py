"""What a log shows of a run, and when."""

import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from command_line import run_cli
from rich.console import Console
from rich.progress import Progress

from prox24_deploy.cli.progress import Lines, _Left, in_words

# ISO 8601 to the second, with the offset from UTC.
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"


def lines_of(steps: list[tuple[float, str, int, int]]) -> list[str]:
    """What is written when the clock stands so at each step."""
    written: list[str] = []
    times: Iterator[float] = iter([at for at, *_ in steps])
    lines = Lines(written.append, lambda: next(times))
    for _, label, done, total in steps:
        lines.update(label, done, total)
    return written


def test_every_block_has_a_line_with_an_estimate() -> None:
    assert lines_of([(0, "prune", 0, 3), (40, "prune", 1, 3), (90, "prune", 2, 3),
                     (120, "prune", 3, 3)]) == [
        "prune 0/3",
        "prune 1/3, 40 s, about 80 s left",
        "prune 2/3, 90 s, about 45 s left",
        "prune 3/3, 2 min",
    ]  # fmt: skip


def test_short_steps_are_told_now_and_then_and_at_the_end() -> None:
    steps = [(float(at), "evaluate", at, 100) for at in range(101)]
    assert lines_of(steps) == [
        "evaluate 0/100",
        "evaluate 30/100, 30 s, about 70 s left",
        "evaluate 60/100, 60 s, about 40 s left",
        "evaluate 90/100, 90 s, about 10 s left",
        "evaluate 100/100, 2 min",
    ]


def test_a_label_that_comes_again_begins_anew() -> None:
    steps = [(0.0, "accuracy", 0, 1), (5.0, "accuracy", 1, 1), (5.0, "accuracy", 1, 1),
             (9.0, "accuracy", 1, 1)]  # fmt: skip
    assert lines_of(steps) == ["accuracy 0/1", "accuracy 1/1, 5 s"]
    assert lines_of([(0.0, "x", 0, 2), (200.0, "x", 2, 2), (201.0, "x", 0, 2)])[-1] == "x 0/2"


def test_a_bar_says_how_much_is_left() -> None:
    clock, screen = [0.0], StringIO()
    columns = [_Left()]
    with Progress(*columns, console=Console(file=screen), get_time=lambda: clock[0]) as bars:
        task = bars.add_task("prune", total=4)
        assert columns[0].render(bars.tasks[0]).plain == ""
        clock[0] = 30.0
        bars.update(task, completed=1)
        assert columns[0].render(bars.tasks[0]).plain == "90 s left"
        bars.update(task, completed=4)
        assert columns[0].render(bars.tasks[0]).plain == ""


def test_times_are_in_words() -> None:
    assert [in_words(s) for s in (0.4, 99, 101, 3590, 7500)] == [
        "0 s", "99 s", "2 min", "1 h 0 min", "2 h 5 min",
    ]  # fmt: skip


def test_a_log_has_lines_and_a_quiet_run_has_none(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    line = ("prune", tiny_bert, "--calibration", prose, "--calibration-tokens", "2048",
            "--method", "magnitude", "-o")  # fmt: skip
    run = run_cli(*line, tmp_path / "told")
    assert run.code == 0, run.err
    assert re.search(rf"^{TIME} prune 1/2, \d+ s, about \d+ s left$", run.err, re.MULTILINE)
    assert "q_proj" not in run.err
    for flag in ("-q", "--quiet"):
        quiet = run_cli(*line, tmp_path / f"quiet{flag}", flag)
        assert (quiet.code, quiet.err) == (0, "")
        assert quiet.out


def test_verbose_adds_layers_and_a_log_file_has_all_of_it(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    line = ("prune", tiny_bert, "--calibration", prose, "--calibration-tokens", "2048",
            "--method", "magnitude", "-o", tmp_path / "out")  # fmt: skip
    layer = rf"^{TIME} encoder\.layer\.0\.attention\.self\.query: error [\d.]+, [\d.]+ s$"
    log = tmp_path / "run.log"
    quiet = run_cli("-q", *line, "--log-file", log)
    assert (quiet.code, quiet.err) == (0, "")
    written = log.read_text()
    # What is shown at the end, tables too.
    assert [line.partition(" ")[2] for line in written.splitlines()][-14:] == (
        quiet.out.splitlines()[-14:]
    )
    assert re.search(layer, written, re.MULTILINE)
    assert re.search(rf"^{TIME} prune 2/2, \d+ s$", written, re.MULTILINE)
    again = run_cli(*line, f"--log-file={log}", "-v", "--fresh")
    assert again.code == 0
    assert re.search(layer, again.err, re.MULTILINE)
    # What was there stays.
    assert log.read_text().startswith(written)
    unchanged = run_cli(*line)
    assert re.fullmatch(rf"{TIME} stage prune: unchanged, not run again\n", unchanged.err)


def test_an_error_is_the_last_line_of_a_log_file(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    run = run_cli("build", tmp_path / "none", "--log-file", log)
    assert run.code == 2
    assert run.err.count("none") == 1
    assert re.fullmatch(rf"{TIME} ERROR (.*)\n", log.read_text())
    assert log.read_text().partition(" ERROR ")[2] == run.err.removeprefix("Error: ")


def test_a_log_file_that_cannot_be_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    run = run_cli("doctor", "--log-file", tmp_path / "none" / "run.log")
    assert run.code == 2
    assert run.err.endswith("pass a file in a folder that is there and may be written.\n")
    out = tmp_path / "out"
    out.mkdir()
    kept = out / "kept.txt"
    kept.write_text("mine")
    for path in (out / "run.log", kept):
        run = run_cli("build", tiny_bert, "-o", out, "--log-file", path)
        assert run.code == 2
        assert f"Log file {path} lies in the bundle" in run.err
    assert [p.name for p in out.iterdir()] == ["kept.txt"]
    assert kept.read_text() == "mine"
