"""What the command line itself does: options anywhere, errors in one sentence, tables that fit."""

import errno
import io
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from command_line import run_cli
from rich.console import Console
from typer.models import OptionInfo

from prox24_deploy import __version__
from prox24_deploy.cli import options, tables
from prox24_deploy.cli.options import fill_budget, hoist_common, join_shapes
from prox24_deploy.cli.terminal import print_json
from prox24_deploy.config.options import parse_dtype, parse_shapes
from prox24_deploy.core.errors import EngineError, UsageError
from prox24_deploy.core.records import (
    DirectMetric,
    Estimate,
    LayerRecord,
    PairedMetric,
    TensorCheck,
)
from prox24_deploy.pipeline import run as pipeline


def raises(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_version_and_help_are_instant_and_light() -> None:
    assert run_cli("--version").out.strip() == __version__
    helped = run_cli("--help")
    assert helped.code == 0
    for command in ("build", "prune", "export", "compile", "bench", "check", "verify", "doctor"):
        assert command in helped.out
    assert "Exit codes" in helped.out


def test_the_module_runs_as_the_command_does() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "prox24_deploy", "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.strip() == __version__


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (EngineError("The engine broke; mend it."), 1, "Error: The engine broke; mend it."),
        (ZeroDivisionError("oops"), 1, "Internal error, ZeroDivisionError: oops; run again with"),
        (OSError(errno.ENOSPC, "full", "/out/x"), 2, "No space left on the disk while writing"),
        (OSError(errno.EACCES, "Permission denied", "/m/x"), 2, "/m/x cannot be read (Permission"),
        (OSError(errno.EIO, "I/O error", "/m/x"), 2, "/m/x cannot be read (I/O error); check its"),
        (OSError(errno.EBADF, "Bad file descriptor"), 1, "Internal error, OSError"),
        (MemoryError(), 5, "Error: Not enough memory for this model"),
        (KeyboardInterrupt(), 130, "Interrupted; finished stages are kept"),
    ],
)
def test_every_error_is_one_sentence_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str
) -> None:
    monkeypatch.setattr(pipeline, "export", raises(error))
    run = run_cli("export", "somewhere")
    assert run.code == code
    assert expected in run.err
    assert len(run.err.strip().splitlines()) == 1
    assert run.out == ""


def test_an_interrupt_around_a_command_ends_it_as_one_within(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "require_utf8", raises(KeyboardInterrupt()))
    run = run_cli("export", "somewhere")
    assert (run.code, run.out) == (130, "")
    assert run.err.startswith("Interrupted; finished stages are kept")
    assert "Traceback" not in run.err


def test_a_traceback_is_shown_with_debug_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "export", raises(ZeroDivisionError("oops")))
    assert "Traceback" not in run_cli("export", "somewhere").err
    for line in (("export", "somewhere", "--debug"), ("--debug", "export", "somewhere")):
        run = run_cli(*line)
        assert run.code == 1
        assert "Traceback" in run.err


def test_common_options_may_stand_anywhere() -> None:
    assert hoist_common(["build", "x", "-v", "--json"]) == ["-v", "build", "x", "--json"]


def test_recovery_may_be_asked_for_without_a_budget() -> None:
    assert fill_budget(["build", "m", "--recover", "-o", "x"]) == [
        "build", "m", "--recover", "5min", "-o", "x",
    ]  # fmt: skip
    assert fill_budget(["build", "m", "--recover"]) == ["build", "m", "--recover", "5min"]
    for given in (
        ["build", "--recover", "9steps", "m"],
        ["build", "m", "--recover=2"],
        ["recover"],
    ):
        assert fill_budget(given) == given


def test_what_a_value_is_called_is_not_the_name_of_its_option() -> None:
    """Versions 0.27.0 to 0.27.2 of typer make an option of the metavar where it has no name."""
    named = {name: get_args(kind)[1] for name, kind in vars(options).items() if name[-3:] == "Opt"}
    assert len(named) > 40
    for name, option in named.items():
        assert isinstance(option, OptionInfo), name
        # Until an annotation is read, its first name stands where a default would.
        assert option.metavar is None or isinstance(option.default, str), name


def test_json_has_null_where_a_number_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"seconds": math.inf, "rows": [{"error": math.nan}], "name": Path("a")})
    assert capsys.readouterr().out == '{"seconds": null, "rows": [{"error": null}], "name": "a"}\n'


def test_shapes_take_several_words() -> None:
    line = ["build", "m", "--shapes", "batch=1,8", "sequence=128", "-o", "x=1"]
    assert join_shapes(line) == [
        "build", "m", "--shapes", "batch=1,8", "--shapes", "sequence=128", "-o", "x=1",
    ]  # fmt: skip
    assert parse_shapes(["batch=1,8", "sequence=128"]) == {"batch": (1, 8), "sequence": (128,)}
    assert parse_shapes(["batch=2", "past=8,16"]) == {"batch": (2,), "past": (8, 16)}
    assert parse_shapes(["batch=2 sequence=16"]) == {"batch": (2,), "sequence": (16,)}
    for wrong in ("batch", "batch=", "batch=-1", "depth=1", "batch=1;2"):
        with pytest.raises(UsageError, match=r"is not understood, expected batch=N"):
            parse_shapes([wrong])


def test_doctor_prints_what_is_missing_with_its_remedy() -> None:
    run = run_cli("doctor")
    assert run.code == 0
    assert "onnxruntime" in run.out
    assert "tensorrt" in run.out
    # An answer is read, in a pipe too: a block for each finding.
    assert "\nlm-eval\n  found: " in run.out
    assert "\n  for: build --lm-eval\n" in run.out


def rendered(renderable: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_a_narrow_terminal_folds_names_and_drops_none() -> None:
    name = "encoder.layer.11.attention.output.dense"
    pruned = LayerRecord(
        name=name,
        shape=(768, 768),
        status="pruned",
        reason="",
        method="prox",
        relative_error=0.0123,
        held_out_error=0.0456,
        iterations=9,
        seconds=1.0,
    )
    dense = LayerRecord(
        name="lm_head",
        shape=(9, 8),
        status="skipped",
        reason="tied",
        method="",
        relative_error=None,
        held_out_error=None,
        iterations=0,
        seconds=0.0,
    )
    text = rendered(tables.layers([pruned, dense]), 44)
    assert max(map(len, text.splitlines())) <= 44
    folded = "".join(line.split(" ")[1] for line in text.splitlines()[1:])
    assert folded.startswith(name)
    wide = rendered(tables.layers([pruned, dense]), 120)
    assert f" {name} " in wide
    assert "0.0123" in wide
    assert "dense: tied" in wide


def test_checks_say_what_is_lost_and_why_a_weight_is_not_eligible() -> None:
    lost = TensorCheck(
        tensor="w",
        module="attn.k",
        node="n",
        op_type="MatMul",
        dtype="float32",
        shape=(8, 4),
        axis=0,
        density=0.75,
        is_24=False,
        expected=True,
        first_violation=(4, 1),
        reason="4 non-zeros in group [4:8, 1]",
        part="[:, 8:12]",
        eligible=False,
        ineligible_reason="it is not proven 2:4; float32 has",
    )
    dense = replace(lost, module="head", expected=False, part="")
    proven = replace(lost, module="", is_24=True, eligible=True, part="")
    open_ = replace(
        lost, module="moe", unproven=True, axis=-1, reason="chosen [at] run time", part=""
    )
    left = replace(open_, expected=False)
    text = rendered(tables.checks([lost, dense, proven, open_, left]), 200)
    first, second, third, *others = (" ".join(line.split()) for line in text.splitlines()[1:])
    assert first == (
        "attn.k[:, 8:12] float32 0 8×4 0.750 no: 4 non-zeros in group [4:8, 1] "
        "no: it is not proven 2:4; float32 has"
    )
    assert second == "head float32 0 8×4 0.750 dense no: it is not proven 2:4; float32 has"
    assert third == "w float32 0 8×4 0.750 yes yes"
    end = "no: it is not proven 2:4; float32 has"
    assert others == [
        f"moe float32 8×4 0.750 not proven: chosen [at] run time {end}",
        f"moe float32 8×4 0.750 not read: chosen [at] run time {end}",
    ]


def test_a_metric_shows_what_it_has() -> None:
    value = Estimate(value=0.5, standard_error=0.01)
    agreement = DirectMetric(
        name="cosine",
        higher_is_better=True,
        samples=7,
        agreement=value,
    )
    assert tables.metric_line(agreement) == "cosine: 0.5000 ± 0.0100 (7 samples)"
    both = PairedMetric(
        name="perplexity",
        higher_is_better=False,
        samples=7,
        dense=value,
        sparse=Estimate(value=2.0, standard_error=0.1),
        difference=value,
    )
    assert tables.metric_line(both) == (
        "perplexity: dense 0.5000 ± 0.0100, sparse 2.0000 ± 0.1000, difference 0.5000 ± 0.0100"
        " (7 samples)"
    )


def test_prune_lists_every_layer(tiny_bert: Path, prose: Path, tmp_path: Path) -> None:
    run = run_cli(
        "prune", tiny_bert, "-o", tmp_path / "out", "--calibration", prose, "--preset", "fast",
        "--calibration-tokens", "2048", "--evaluation-tokens", "1024", "-v",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "encoder.layer.1.output.dense" in run.out
    assert "pooler.dense" in run.out
    assert "12 layers are 2:4" in run.out
    assert "error" in run.err


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("FP32", "float32"),
     ("float16", "float16")],
)  # fmt: skip
def test_precisions_have_their_short_names(word: str, dtype: str) -> None:
    assert parse_dtype(word) == dtype
    refused = run_cli("export", "somewhere", "--dtype", "fp99")
    assert refused.code == 2
    assert "Precision 'fp99' is not known, expected one of float32, float16" in refused.err


@pytest.mark.parametrize("command", [(), ("build",), ("baseline", "update")])
def test_h_is_help(command: tuple[str, ...]) -> None:
    assert run_cli(*command, "-h") == run_cli(*command, "--help")
    assert run_cli(*command, "-h").code == 0
