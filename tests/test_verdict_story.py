"""A ruined model on its way to a release: nothing on that way calls it passed."""

import shutil
from pathlib import Path

import pytest
from command_line import Run, run_cli
from markdown_it import MarkdownIt
from tiny_models import configure

from prox24_deploy.report.schema import load_report

SMALL = (
    "--calibration-tokens", "2048", "--method", "magnitude", "--shapes", "batch=1", "sequence=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def ruined(
    tiny_bert: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Path]:
    """Pruned by magnitude, which takes half of all nearest neighbours away."""
    out = tmp_path_factory.mktemp("ruined") / "bundle"
    done = run_cli(
        "build", tiny_bert, "-o", out, "--calibration", prose, "--evaluation", prose,
        "--evaluation-tokens", "100000", *SMALL,
    )  # fmt: skip
    return done, out


def test_the_first_line_of_everything_says_that_it_failed(ruined: tuple[Run, Path]) -> None:
    done, out = ruined
    assert done.code == 3
    report = load_report(out / "report.json")
    assert report.verdict == report.parts.accuracy.verdict == "fail"
    assert (report.parts.sparsity.verdict, report.parts.export.verdict) == ("pass", "pass")
    assert report.sentence.startswith("Failed on accuracy: nearest-neighbour agreement 0.")
    card = (out / "pruned" / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    firsts = {
        "terminal": done.out.splitlines()[0],
        "summary": (out / "summary.md").read_text(encoding="utf-8").splitlines()[0],
        "card": " ".join([line for line in card.splitlines() if line][1:3]),
        "page": (out / "report.html").read_text(encoding="utf-8").split('class="verdict')[1][:400],
    }
    for view, text in firsts.items():
        assert report.sentence in text, view
    everything = [*out.glob("report.*"), out / "summary.md", out / "pruned" / "README.md"]
    assert all("Passed" not in file.read_text(encoding="utf-8") for file in everything)
    assert MarkdownIt().render(firsts["summary"])


def test_it_is_not_packaged(ruined: tuple[Run, Path], tmp_path: Path) -> None:
    _, out = ruined
    refused = run_cli("package", out, "--triton", tmp_path / "models")
    assert refused.code != 0
    assert "Failed on accuracy" in refused.err
    assert "--force" in refused.err
    assert list(tmp_path.iterdir()) == []


def test_two_samples_decide_nothing(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "bundle", Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    configure(model, max_position_embeddings=512)
    done = run_cli(
        "build", model, "-o", out, "--calibration", prose, "--evaluation", prose,
        "--evaluation-tokens", "1024", *SMALL,
    )  # fmt: skip
    assert done.code == 5
    assert "Evaluation has 2 samples" in done.err
    assert done.out.startswith("Inconclusive on accuracy: ")
    assert run_cli("package", out, "--triton", tmp_path / "models").code != 0


def test_a_limit_of_a_misspelt_metric_is_refused_before_any_work(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text('["against-dense"."embeding cosine"]\nthreshold = 0.5\n', encoding="utf-8")
    done = run_cli(
        "build", tiny_bert, "-o", tmp_path / "out", "--calibration", prose, "--limits", limits,
        *SMALL,
    )  # fmt: skip
    assert done.code == 2
    assert "embedding cosine" in done.err
    assert not (tmp_path / "out").exists()
