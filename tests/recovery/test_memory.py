"""What a recovery needs is told before it begins, and refused where it is not there."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from command_line import run_cli
from opened import open_tiny
from test_recover import CPU

from prox24_deploy.config.options import RecoverOptions
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.host import GIB, free_memory
from prox24_deploy.model.directory import load_model
from prox24_deploy.model.offload import free_on
from prox24_deploy.pipeline import run as pipeline
from prox24_deploy.recovery import memory
from prox24_deploy.recovery.memory import (
    Sizes,
    need_of,
    require_memory,
    sizes_of,
)

ONE = RecoverOptions(steps=1)


def test_values_are_counted_as_the_model_has_them(tiny_llama: Path, prose: Path) -> None:
    opened = open_tiny(tiny_llama, prose, tokens=2048)
    model = load_model(opened.directory, opened.recipe, CPU)
    found = sizes_of(opened.directory, embeddings=False)
    parameters = list(model.parameters())
    assert found.all == sum(p.numel() for p in parameters)
    assert found.vectors == sum(p.numel() for p in parameters if p.ndim == 1)
    table = model.get_parameter("model.embed_tokens.weight")
    assert found.all - found.matrices - found.vectors == table.numel()
    both = sizes_of(opened.directory, embeddings=True)
    assert both.matrices == found.matrices + table.numel()


def test_the_parts_of_a_need_are_those_of_what_is_allocated() -> None:
    """7 billion values, of which all are trained: what fits a GPU of 80 GiB, and what does not."""
    sizes = Sizes(all=7 * 10**9, matrices=7 * 10**9, vectors=0)
    gpu = {"teacher_bytes": 2, "stored_bytes": 2, "host": False}
    full, lean = (need_of(sizes, name, **gpu) for name in ("adamw", "adafactor"))  # type: ignore[arg-type]
    assert full.total == (4 + 2 + 4 + 8 + 1) * 7 * 10**9
    assert lean.total == full.total - 8 * 7 * 10**9
    assert lean.total < 80 * GIB < full.total
    host = need_of(sizes, "adamw", teacher_bytes=4, stored_bytes=2, host=True)
    assert host.copies == (2 * 2 + 4) * 7 * 10**9


def test_what_cannot_fit_is_refused_with_what_does(
    tiny_llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_tiny(tiny_llama, prose, tokens=2048)

    def asked(options: RecoverOptions, free: int) -> memory.Need:
        monkeypatch.setattr(memory, "free_on", lambda *_: free)
        return require_memory(opened.directory, opened.recipe, options, CPU)

    full = asked(ONE, 2**62).total
    lean = asked(replace(ONE, optimizer="adafactor"), 2**62).total
    assert lean < full
    assert asked(ONE, full).total == full
    with pytest.raises(UsageError, match=r"needs \S+ GiB \(both models .*, optimiser .*; pass --r"):
        asked(ONE, full - 1)
    with pytest.raises(UsageError, match="adafactor, which needs"):
        asked(ONE, lean)
    with pytest.raises(UsageError, match="use a device with more memory, or leave recovery out"):
        asked(ONE, lean - 1)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"has 1e-06 GiB allowed by --memory-limit; "):
        require_memory(opened.directory, opened.recipe, ONE, CPU, int(1e-6 * GIB) + 1)
    two = replace(ONE, processes=2, optimizer="adafactor")
    with pytest.raises(UsageError, match=r"in each of 2 processes, .* a smaller --recover-proc"):
        asked(two, 2 * lean - 1)


def test_the_command_takes_a_limit(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int | None] = []

    def stop(*asked: Any, **_: Any) -> None:
        limits.append(asked[3].memory_limit)
        raise UsageError("far enough")

    monkeypatch.setattr(pipeline, "recover", stop)
    for more in ((), ("--memory-limit", "2")):
        assert run_cli("recover", tiny_llama, "--teacher", tiny_llama, *more).code == 2
    assert limits == [None, 2 * GIB]


def test_free_memory_is_that_of_the_machine_or_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    machine = SimpleNamespace(available=8 * 1024)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert free_memory(tmp_path) == 8 * 1024
    limit.write_text("max\n", encoding="ascii")
    used.write_text("100\n", encoding="ascii")
    assert free_memory(tmp_path) == 8 * 1024
    limit.write_text("1100\n", encoding="ascii")
    assert free_memory(tmp_path) == 1000
    (tmp_path / "memory.stat").write_text("anon 50\ninactive_file 40\n", encoding="ascii")
    assert free_memory(tmp_path) == 1040
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7, 9))
    assert free_on(torch.device("cuda"), None) == 7
