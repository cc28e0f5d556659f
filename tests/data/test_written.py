"""Text that a model writes itself: from its own distribution, the same every time, and usable."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_cases import CPU, LLAMA
from torch import nn

from prox24_deploy.core.types import silent
from prox24_deploy.data.written import Author, author_of, is_degenerate, write_text
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.processors import load_tokenizer

NAMES = ("input_ids", "attention_mask")


@pytest.fixture(scope="module")
def author(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Author:
    directory = open_model_dir(tiny_llama)
    model = load_model(directory, LLAMA, CPU)
    found = author_of(
        model, load_tokenizer(directory), length=24, seed=0, folder=tmp_path_factory.mktemp("kept")
    )
    assert found is not None
    return found


def test_rows_begin_with_the_start_token_and_are_the_same_every_time(
    author: Author, tmp_path: Path
) -> None:
    rows = author.write(0)
    assert {len(row) for row in rows} == {24}
    assert {row[0] for row in rows} == {0}
    assert author.write(0) == rows
    assert replace(author, folder=tmp_path / "a").write(0) == rows
    assert author.write(1) != rows
    assert replace(author, folder=tmp_path / "b", seed=1).write(0) != rows


def test_a_batch_that_is_kept_is_not_written_again(
    author: Author, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = replace(author, folder=tmp_path)
    rows = own.write(0)

    def forbidden(*_: object) -> torch.Tensor:
        raise AssertionError("written again")

    monkeypatch.setattr(Author, "_sample", forbidden)
    assert own.write(0) == rows
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="written again"):
        own.write(0)


class Coin(nn.Module):
    """Gives each of its tokens with a fixed chance, whatever stands before."""

    def __init__(self, chances: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(chances).log(), requires_grad=False)
        self.config = SimpleNamespace(
            num_attention_heads=1, hidden_size=4, num_hidden_layers=1, eos_token_id=3
        )

    def forward(self, input_ids: torch.Tensor, past_key_values: object, use_cache: bool) -> object:  # noqa: FBT001
        logits = self.logits.expand(*input_ids.shape, -1)
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


def test_tokens_come_as_often_as_the_model_says(tmp_path: Path) -> None:
    author = Author(
        model=Coin([0.1, 0.6, 0.3]), start=0, ends=frozenset(), length=500, seed=0, folder=tmp_path
    )
    rows = torch.tensor(author.write(0))[:, 1:]
    shares = torch.bincount(rows.flatten(), minlength=3) / rows.numel()
    # 16 thousand draws: four standard errors are 0.016.
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.6, 0.3]), atol=0.016, rtol=0)


def test_a_row_ends_with_its_end_token(tmp_path: Path) -> None:
    author = Author(
        model=Coin([0.1, 0.4, 0.4, 0.1]),
        start=0, ends=frozenset({3}), length=64, seed=0, folder=tmp_path,
    )  # fmt: skip
    rows = author.write(0)
    assert all(row.index(3) == len(row) - 1 for row in rows if 3 in row)
    assert any(len(row) < 64 for row in rows)
    assert all(len(row) == 64 for row in rows if 3 not in row)


def test_what_repeats_itself_or_is_short_is_degenerate() -> None:
    assert is_degenerate(list(range(15)))
    assert not is_degenerate(list(range(16)))
    assert is_degenerate([7] * 11 + list(range(8, 18)))
    assert is_degenerate([1, 2, 3, 4, 5] * 6)


def test_whole_windows_of_what_is_usable(author: Author) -> None:
    batches, record = write_text(author, 1000, NAMES, 1, silent)
    assert record.tokens == sum(batch.real.numel() for batch in batches)
    assert 1000 - 24 < record.tokens <= 1000
    assert all(tuple(batch.inputs["input_ids"].shape) == (1, 24) for batch in batches)
    assert record.samples <= record.written
    assert write_text(author, 1000, NAMES, 1, silent)[1] == record


def test_a_window_that_is_shorter_than_a_text_should_be_is_filled(tmp_path: Path) -> None:
    author = Author(
        model=Coin([0.25] * 4), start=0, ends=frozenset(), length=8, seed=0, folder=tmp_path
    )
    _, record = write_text(author, 64, NAMES, 1, silent)
    assert record.tokens == 64


def test_a_model_that_repeats_itself_writes_nothing_and_comes_to_an_end(tmp_path: Path) -> None:
    author = Author(
        model=Coin([1e-9, 1.0]), start=0, ends=frozenset(), length=32, seed=0, folder=tmp_path
    )
    batches, record = write_text(author, 4000, NAMES, 1, silent)
    assert (len(batches), record.samples, record.tokens) == (0, 0, 0)
    assert record.written > 0


def test_a_model_without_a_start_token_is_no_author(author: Author, tmp_path: Path) -> None:
    nameless = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    model = Coin([0.5, 0.5])
    model.config.bos_token_id = None
    model.config.eos_token_id = None
    assert author_of(model, nameless, length=8, seed=0, folder=tmp_path) is None
