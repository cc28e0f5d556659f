"""A release pipeline from its first baseline to every way in which a later build can end."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from command_line import ANY_EMBEDDING, run_cli, snapshot
from junitparser import Error, Failure, JUnitXml, Skipped
from markdown_it import MarkdownIt

from prox24_deploy.core.records import Engine
from prox24_deploy.engines.base import Array, Feeds, Session
from prox24_deploy.engines.onnxruntime import OnnxRuntime
from prox24_deploy.report.schema import Report

SMALL = (
    "--calibration-tokens", "4096", "--evaluation-tokens", "2048", "--shapes", "batch=2",
    "sequence=16", *ANY_EMBEDDING,
)  # fmt: skip
LATENCY = "latency/onnxruntime/batch=2,sequence=16"
SPEED_UP = "speed-up/onnxruntime/batch=2,sequence=16"
SLEEP_MS = 5.0

LatenciesOf = Callable[[Session, Feeds, int], npt.NDArray[np.float64]]


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, prose: Path) -> Path:
    """The bundle of the first release."""
    out = tmp_path_factory.mktemp("accepted") / "bundle"
    run = run_cli("build", tiny_bert, "-o", out, "--calibration", prose, *SMALL)
    assert run.code == 0, run.err
    return out


@pytest.fixture(scope="module")
def baseline(accepted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baseline") / "baseline.json"
    run = run_cli("baseline", "update", accepted, path, "--reason", "first release")
    assert run.code == 0, run.err
    return path


@pytest.fixture
def again(accepted: Path, tmp_path: Path) -> Path:
    """The accepted bundle, to be measured again."""
    return Path(shutil.copytree(accepted, tmp_path / "again"))


def write_limits(folder: Path, text: str) -> Path:
    path = folder / "limits.toml"
    path.write_text(text, encoding="utf-8")
    return path


def results(folder: Path) -> dict[str, list[Any]]:
    """What JUnit says of every figure."""
    xml = JUnitXml.fromfile(str(folder / "compare.junit.xml"))
    return {case.name: case.result for suite in xml for case in suite}


def rendered_cells(folder: Path) -> list[str]:
    """The first cell of every row of the Markdown, as a renderer reads it."""
    text = (folder / "compare.md").read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert not [token for token in tokens if token.type in {"html_block", "html_inline"}]
    rows = [i for i, token in enumerate(tokens) if token.type == "tr_open"]
    return [tokens[i + 2].content for i in rows]


@contextmanager
def planted(
    monkeypatch: pytest.MonkeyPatch, twins: tuple[str, ...], latencies: LatenciesOf
) -> Iterator[None]:
    """Replace what the sessions of some twins say of their latency, at the seam of the backend."""

    class Planted:
        def __init__(self, session: Session) -> None:
            self._session = session

        def infer(self, feeds: Feeds) -> dict[str, Array]:
            return self._session.infer(feeds)

        def latencies_ms(self, feeds: Feeds, *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
            return latencies(self._session, feeds, runs)

    original: Callable[..., AbstractContextManager[Session]] = OnnxRuntime.open

    @contextmanager
    def opened(self: OnnxRuntime, bundle: Path, engine: Engine) -> Iterator[Session]:
        with original(self, bundle, engine) as session:
            yield Planted(session) if engine.twin in twins else session

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntime, "open", opened)
        yield


def planted_sleep(session: Session, feeds: Feeds, runs: int) -> npt.NDArray[np.float64]:
    """Every run takes five milliseconds longer."""
    elapsed = []
    for _ in range(runs):
        began = time.perf_counter_ns()
        time.sleep(SLEEP_MS / 1e3)
        slept = (time.perf_counter_ns() - began) / 1e6
        elapsed.append(slept + float(session.latencies_ms(feeds, runs=1, warmup=0)[0]))
    return np.array(elapsed)


def planted_noise(seed: int) -> LatenciesOf:
    """Runs of one millisecond whose logarithm has a standard deviation of one."""
    random = np.random.default_rng(seed)
    return lambda session, feeds, runs: random.lognormal(0.0, 1.0, runs)


def measure_again(bundle: Path, model: Path, prose: Path) -> None:
    measured = run_cli("bench", bundle, "--shapes", "batch=2", "sequence=16")
    assert measured.code == 0, measured.err
    built = run_cli("build", model, "-o", bundle, "--calibration", prose, *SMALL)
    assert built.code == 0, built.err


def test_the_same_build_made_again_passes(
    baseline: Path, tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    built = run_cli(
        "build", tiny_bert, "-o", out, "--calibration", prose, "--baseline", baseline, *SMALL
    )
    assert built.code == 0, built.err
    report = Report.model_validate_json((out / "report.json").read_bytes())
    assert report.baseline is not None
    assert report.baseline.reason == "first release"
    assert not report.regressions
    assert all(len(metric.values) == metric.samples for metric in report.accuracy.metrics)
    held = {check.name for check in report.checks if check.kind == "baseline" and check.gated}
    assert {"embedding cosine", "layers/pruned", "layers/proven", "size/onnx sparse"} <= held
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Against the baseline</h2>" in page
    assert "embedding cosine over releases" in page
    assert "Figures of accepted releases" in page
    run = run_cli("compare", out, baseline, "-o", tmp_path / "gate")
    assert run.code == 0, run.err
    assert "Verdict: pass" in run.out
    assert {path.name for path in (tmp_path / "gate").iterdir()} == {
        "compare.json", "compare.md", "compare.junit.xml", "benchmark.json",
    }  # fmt: skip
    found = results(tmp_path / "gate")
    assert found["embedding cosine"] == []
    assert [type(part) for part in found[LATENCY]] == [Skipped]
    assert "`embedding cosine`" in rendered_cells(tmp_path / "gate")


def test_harder_pruning_fails_by_its_accuracy(
    baseline: Path, tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    built = run_cli(
        "build", tiny_bert, "-o", out, "--calibration", prose, "--method", "magnitude",
        "--refinement", "none", "--baseline", baseline, *SMALL,
    )  # fmt: skip
    assert built.code == 3, built.err
    report = Report.model_validate_json((out / "report.json").read_bytes())
    assert report.verdict == "fail"
    assert "embedding cosine" in {check.name for check in report.regressions}
    run = run_cli("compare", out, baseline, "-o", tmp_path / "gate")
    assert run.code == 3
    found = results(tmp_path / "gate")
    assert [type(part) for part in found["embedding cosine"]] == [Failure]
    assert "at most 2 % worse" in found["embedding cosine"][0].message
    text = (tmp_path / "gate" / "compare.md").read_text(encoding="utf-8")
    assert text.index("### Regressions") < text.index("`embedding cosine`") < text.index("### Held")


def test_a_slower_sparse_engine_fails_where_its_latency_is_gated(
    again: Path,
    baseline: Path,
    tiny_bert: Path,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with planted(monkeypatch, ("sparse",), planted_sleep):
        measure_again(again, tiny_bert, prose)
    limits = write_limits(
        tmp_path,
        '["latency/*"]\nmax-degradation-percent = 50\n'
        '["speed-up/*"]\nmax-degradation-percent = 30\n',
    )
    run = run_cli("compare", again, baseline, "--limits", limits, "-o", tmp_path / "gate")
    assert run.code == 3
    found = results(tmp_path / "gate")
    assert [type(part) for part in found[LATENCY]] == [Failure]
    assert [type(part) for part in found[SPEED_UP]] == [Failure]
    assert "without the change of the dense twin worse by" in found[LATENCY][0].message
    # This backend has no sparse kernels: unless a file says so, its latency is only told.
    assert run_cli("compare", again, baseline).code == 0


def test_a_slower_machine_is_not_taken_for_a_slower_model(
    again: Path,
    baseline: Path,
    tiny_bert: Path,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with planted(monkeypatch, ("dense", "sparse"), planted_sleep):
        measure_again(again, tiny_bert, prose)
    limits = write_limits(tmp_path, '["latency/*"]\nmax-degradation-percent = 50\n')
    run = run_cli("compare", again, baseline, "--limits", limits, "-o", tmp_path / "gate")
    assert run.code == 5
    (skipped,) = results(tmp_path / "gate")[LATENCY]
    assert isinstance(skipped, Skipped)
    assert "so the machine may have been slower" in skipped.message


def test_noise_is_inconclusive(
    again: Path,
    baseline: Path,
    tiny_bert: Path,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with planted(monkeypatch, ("dense", "sparse"), planted_noise(0)):
        measure_again(again, tiny_bert, prose)
    limits = write_limits(tmp_path, '["speed-up/*"]\nmax-degradation-percent = 5\n')
    run = run_cli("compare", again, baseline, "--limits", limits, "-o", tmp_path / "gate", "--json")
    assert run.code == 5
    assert json.loads(run.out)["verdict"] == "inconclusive"
    (skipped,) = results(tmp_path / "gate")[SPEED_UP]
    assert isinstance(skipped, Skipped)
    assert "### Undecided" in (tmp_path / "gate" / "compare.md").read_text(encoding="utf-8")


def test_another_machine_is_refused_unless_it_is_allowed(
    accepted: Path, baseline: Path, tmp_path: Path
) -> None:
    report = json.loads((accepted / "report.json").read_bytes())
    report["environment"] |= {"gpu": "NVIDIA H200", "driver": "570.1"}
    edited = tmp_path / "report.json"
    edited.write_text(json.dumps(report), encoding="utf-8")
    run = run_cli("compare", edited, baseline, "-o", tmp_path / "gate")
    assert run.code == 2
    assert "gpu is 'NVIDIA H200' and was" in run.err
    assert "driver is '570.1' and was 'not known'" in run.err
    assert "--allow gpu --allow driver" in run.err
    assert not (tmp_path / "gate").exists()
    half = run_cli("compare", edited, baseline, "--allow", "gpu")
    assert half.code == 2
    assert "gpu is" not in half.err
    allowed = run_cli("compare", edited, baseline, "--allow", "gpu", "--allow", "driver")
    assert allowed.code == 0, allowed.err
    assert "Note: gpu is NVIDIA H200" in allowed.out
    unknown = run_cli("compare", edited, baseline, "--allow", "weather")
    assert unknown.code == 2
    assert "--allow weather names nothing that is compared" in unknown.err


def test_a_figure_that_vanished_fails_by_name(
    accepted: Path, baseline: Path, tmp_path: Path
) -> None:
    report = json.loads((accepted / "report.json").read_bytes())
    metrics = report["accuracy"]["metrics"]
    metrics[:] = [metric for metric in metrics if metric["name"] != "embedding cosine"]
    edited = tmp_path / "report.json"
    edited.write_text(json.dumps(report), encoding="utf-8")
    run = run_cli("compare", edited, baseline, "-o", tmp_path / "gate")
    assert run.code == 3
    (error,) = results(tmp_path / "gate")["embedding cosine"]
    assert isinstance(error, Error)
    assert "Missing in the report" in error.message


def test_compare_writes_nothing_without_a_folder_and_nothing_into_a_bundle(
    accepted: Path, baseline: Path
) -> None:
    before = snapshot(accepted), snapshot(baseline.parent)
    assert run_cli("compare", accepted, baseline).code == 0
    refused = run_cli("compare", accepted, baseline, "-o", accepted)
    assert refused.code == 2
    assert "whose files are sealed" in refused.err
    assert (snapshot(accepted), snapshot(baseline.parent)) == before


def of_another_gpu(baseline: Path, folder: Path) -> Path:
    """The same baseline, had it been made on a machine with another GPU."""
    other = json.loads(baseline.read_bytes())
    other["report"]["environment"]["gpu"] = "NVIDIA H200"
    path = folder / "other.json"
    path.write_text(json.dumps(other), encoding="utf-8")
    return path


def test_a_build_unlike_its_baseline_is_made_and_says_so(
    again: Path, baseline: Path, tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    path = of_another_gpu(baseline, tmp_path)
    run = run_cli(
        "build", tiny_bert, "-o", again, "--calibration", prose, "--baseline", path, *SMALL
    )
    assert run.code == 5
    assert "cannot be compared with baseline" in run.out
    report = Report.model_validate_json((again / "report.json").read_bytes())
    assert (report.verdict, report.baseline) == ("inconclusive", None)
    missing = run_cli("build", tiny_bert, "-o", again, "--baseline", tmp_path / "none.json", *SMALL)
    assert missing.code == 2
    assert "none.json cannot be read" in missing.err


@pytest.mark.parametrize(
    ("text", "allow", "sentence"),
    [
        (None, "gpu", "limits.toml cannot be read (No such file or directory)"),
        ("threshold", "gpu", "limits.toml is not valid TOML"),
        ("[perplexity]\nlimit = 1\n", "gpu", "unknown key 'limit' under 'perplexity'"),
        ("", "weather", "--allow weather names nothing that is compared"),
    ],
)
def test_build_refuses_what_compare_refuses_and_before_any_work(
    accepted: Path, baseline: Path, tiny_bert: Path, tmp_path: Path,
    text: str | None, allow: str, sentence: str,
) -> None:  # fmt: skip
    limits = tmp_path / "limits.toml" if text is None else write_limits(tmp_path, text)
    options = ("--limits", limits, "--allow", allow)
    compared = run_cli("compare", accepted, baseline, *options)
    built = run_cli("build", tiny_bert, "-o", tmp_path / "out", "--baseline", baseline, *options)
    assert (compared.code, built.code) == (2, 2)
    assert sentence in built.err
    assert built.err == compared.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "allow", "what"),
    [
        ("[perplexity]\nthreshold = 9\n", (), "[perplexity] in --limits {limits}"),
        ("", (), "--limits {limits}, which is empty,"),
        ("[against-dense]\n", (), "--limits {limits}, which is empty,"),
        (
            '["embedding*"]\n[against-dense."embedding cosine"]\nthreshold = 0.9\n',
            (),
            "[embedding*] in --limits {limits}",
        ),
        (None, ("--allow", "gpu"), "--allow gpu"),
    ],
)
def test_what_belongs_to_a_baseline_is_refused_without_one(
    text: str | None, allow: tuple[str, ...], what: str, tiny_bert: Path, tmp_path: Path
) -> None:
    limits = None if text is None else write_limits(tmp_path, text)
    given = () if limits is None else ("--limits", limits)
    run = run_cli("build", tiny_bert, "-o", tmp_path / "out", *given, *allow)
    assert run.code == 2
    told = what.format(limits=limits)
    assert f"{told} has no effect on a build that is held against no baseline" in run.err
    assert "name one with --baseline, or leave it out." in run.err
    assert "Limits against the dense model stand under [against-dense]." in run.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("threshold", "code"), [(-1.0, 0), (1.5, 3)])
def test_the_limits_of_a_file_judge_a_build_as_they_judge_a_comparison(
    threshold: float,
    code: int,
    again: Path,
    baseline: Path,
    tiny_bert: Path,
    prose: Path,
    tmp_path: Path,
) -> None:
    limits = write_limits(tmp_path, f'["embedding cosine"]\nthreshold = {threshold}\n')
    options = ("--limits", limits)
    built = run_cli(
        "build", tiny_bert, "-o", again, "--calibration", prose, "--baseline", baseline, *options,
        *SMALL,
    )  # fmt: skip
    assert built.code == code, built.err
    assert run_cli("compare", again, baseline, *options).code == code
    report = Report.model_validate_json((again / "report.json").read_bytes())
    assert report.baseline is not None
    told = {change.name: change.limits for change in report.baseline.changes}
    assert told["embedding cosine"] == f"at least {threshold:g}"
    assert [check.name for check in report.regressions] == ["embedding cosine"] * (code == 3)
    page = (again / "report.html").read_text(encoding="utf-8")
    assert f"and before them those of {limits.name}" in page


def test_a_build_on_another_machine_passes_where_that_is_allowed_and_tells_it(
    again: Path, baseline: Path, tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    path = of_another_gpu(baseline, tmp_path)
    run = run_cli(
        "build", tiny_bert, "-o", again, "--calibration", prose, "--baseline", path,
        "--allow", "gpu", *SMALL,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "Allowed against the baseline: gpu is" in run.out
    assert "and was NVIDIA H200." in run.out
    report = Report.model_validate_json((again / "report.json").read_bytes())
    assert report.baseline is not None
    assert [difference.key for difference in report.baseline.allowed] == ["gpu"]
