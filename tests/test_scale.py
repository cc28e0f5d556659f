"""The benchmark of scale times what it says that it times."""

import json
import sys

import pytest
import scale


def test_every_part_of_pruning_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "--hidden 32 --inner 64 --heads 2 --kv-heads 2 --blocks 2 --vocabulary 64"
    text = "--length 32 --tokens 256 --whole 4 --parts --preset fast"
    monkeypatch.setattr(sys, "argv", ["scale.py", *shape.split(), *text.split()])
    for module, name in scale._PARTS.values():
        monkeypatch.setattr(module, name, getattr(module, name))
    scale.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [part for part, seconds in line["parts"].items() if not seconds] == ["reconstruct"]
    assert line["seconds"].keys() == {"open", "block 0", "block 1", "write"}
    # Two more blocks, and no third look at the samples.
    assert line["seconds"]["block 1"] < line["whole_seconds"] < 4 * line["total_seconds"]
