"""Recovery of tiny models: what may change, what may not, and how a run ends."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import open_tiny
from safetensors.torch import load_file, save_file

from prox24_deploy.config.options import PruneOptions, RecoverOptions
from prox24_deploy.core.errors import (
    CalibrationError,
    ModelDirError,
    SparsityLostError,
    UsageError,
)
from prox24_deploy.core.records import TextSource
from prox24_deploy.core.recovery import RecoverResult
from prox24_deploy.core.types import silent
from prox24_deploy.model.batch import Samples
from prox24_deploy.model.directory import open_model_dir
from prox24_deploy.pruning.directory import prune_directory
from prox24_deploy.recovery.lesson import Lesson
from prox24_deploy.recovery.pair import require_pair
from prox24_deploy.recovery.recover import Recovery, recover_directory
from prox24_deploy.recovery.schedule import Pace
from prox24_deploy.recovery.student import require_sparse
from prox24_deploy.recovery.training import Training

CPU = torch.device("cpu")
FAST = RecoverOptions(steps=12, step_tokens=512, learning_rate=0.02)


def samples_of(batches: Any) -> Samples:
    count = sum(len(batch.real) for batch in batches)
    source = TextSource(kind="file", paths=(), sha256="0", samples=count, tokens=64 * count)
    return Samples(batches=tuple(batches), source=source)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> dict[Path, Recovery]:
    """By dense model: what recovers its pruned copy."""
    return {}


def case(
    dense: Path, prose: Path, cases: dict[Path, Recovery], tmp: pytest.TempPathFactory
) -> Recovery:
    if dense not in cases:
        opened = open_tiny(dense, prose, tokens=4096)
        samples = samples_of(opened.batches)
        out = tmp.mktemp("pruned") / "pruned"
        prune_directory(
            opened.directory, opened.recipe, samples, samples, PruneOptions(method="magnitude"),
            device=CPU, solved=out.parent / "solved", out=out, progress=silent,
        )  # fmt: skip
        cases[dense] = Recovery(
            dense=opened.directory,
            pruned=open_model_dir(out),
            recipe=opened.recipe,
            calibration=samples,
            options=FAST,
            seed=0,
            device=CPU,
        )
    return cases[dense]


@pytest.fixture(params=["tiny_bert", "tiny_llama", "tiny_gpt2"])
def asked(
    request: pytest.FixtureRequest,
    prose: Path,
    cases: dict[Path, Recovery],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recovery:
    return case(request.getfixturevalue(request.param), prose, cases, tmp_path_factory)


@pytest.fixture
def llama(
    tiny_llama: Path,
    prose: Path,
    cases: dict[Path, Recovery],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recovery:
    return case(tiny_llama, prose, cases, tmp_path_factory)


def recover(asked: Recovery, folder: Path) -> RecoverResult:
    return recover_directory(asked, kept=folder / "kept", out=folder / "out", progress=silent)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_it_comes_nearer_and_only_kept_weights_norms_and_biases_move(
    asked: Recovery, tmp_path: Path
) -> None:
    # What a model of random weights writes is like no text.
    options = replace(FAST, steps=40, learning_rate=0.01, write=False)
    result = recover(replace(asked, options=options), tmp_path)
    assert result.before is not None
    assert result.after is not None
    assert result.after < 0.9 * result.before
    assert result.fitted is not None
    assert 0.3 * result.after < result.fitted < result.before
    assert result.warning == ""
    before, after = tensors(asked.pruned.path), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    sparse = {name for name, tensor in before.items() if 2 * (tensor == 0).sum() == tensor.numel()}
    assert len(sparse) == result.layers
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert sparse <= moved
    assert {before[name].ndim for name in moved - sparse} == {1}
    for name in sparse:
        # Bit for bit: a zero is +0.0 wherever it was.
        zeros = after[name][before[name] == 0]
        assert not zeros.view(torch.int16 if zeros.element_size() == 2 else torch.int32).any(), name
        assert int((after[name] == 0).sum()) == int((before[name] == 0).sum()), name
    assert result.parameters < sum(before[name].numel() for name in moved)


def test_a_killed_run_goes_on_with_the_same_curve(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recover(llama, tmp_path / "whole")
    step, taken = Training._step, []

    def killed(self: Training, *rest: Any) -> float:
        taken.append(1)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(llama, tmp_path / "killed")
    taken.clear()

    def counted(self: Training, *rest: Any) -> float:
        taken.append(1)
        return step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", counted)
        again = recover(llama, tmp_path / "killed")
    assert len(taken) < whole.taken
    assert again.curve == whole.curve
    assert again.state_sha256 == whole.state_sha256


def test_adafactor_comes_nearer_and_goes_on_after_a_kill(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = replace(llama, options=replace(FAST, optimizer="adafactor", write=False))
    whole = recover(lean, tmp_path / "whole")
    assert whole.before is not None
    assert whole.after is not None
    assert whole.after < 0.95 * whole.before
    step, taken = Training._step, []

    def killed(self: Training, *rest: Any) -> float:
        taken.append(1)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(lean, tmp_path / "killed")
    # Rows and columns take far less than weights.
    stored = load_file(tmp_path / "killed" / "kept" / "training.safetensors")
    sizes = dict.fromkeys(("now", "moment"), 0)
    for name, tensor in stored.items():
        if name.partition(".")[0] in sizes:
            sizes[name.partition(".")[0]] += tensor.numel()
    assert sizes["moment"] < 0.1 * sizes["now"]
    assert recover(lean, tmp_path / "killed").curve == whole.curve


def test_embeddings_move_where_that_was_asked_for(asked: Recovery, tmp_path: Path) -> None:
    options = replace(FAST, steps=10, learning_rate=0.003, embeddings=True, write=False)
    result = recover(replace(asked, options=options), tmp_path)
    before, after = tensors(asked.pruned.path), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tables = {name for name in moved if ("embed" in name or ".wte" in name or ".wpe" in name)
              and name.endswith("weight") and before[name].ndim == 2}  # fmt: skip
    assert len(tables) == result.embeddings >= 1
    # Tied tables are one in the file as in the model.
    assert not any("lm_head.weight" in name or "decoder.weight" in name for name in after)


def test_a_diverging_run_ends_with_what_it_was_given_and_says_what_to_change(
    llama: Recovery, tmp_path: Path
) -> None:
    result = recover(replace(llama, options=replace(FAST, learning_rate=1e4)), tmp_path)
    assert result.kept == 0
    assert result.warning.startswith("Recovery diverged (the loss ")
    assert result.warning.endswith("pass a smaller --recover-rate than 10000.")
    given, left = tensors(llama.pruned.path), tensors(tmp_path / "out")
    assert all(torch.equal(given[name], left[name]) for name in given)


def test_a_model_that_does_what_its_teacher_does_is_left_without_a_step(
    llama: Recovery, tmp_path: Path
) -> None:
    found = recover(replace(llama, dense=llama.pruned), tmp_path)
    assert (found.taken, found.kept, found.before) == (0, 0, 0.0)
    assert found.warning == (
        "There is nothing to recover: on withheld samples the loss of the model that was given is "
        "0, so that it is kept as it was; pass the dense model as teacher if this is another."
    )


def test_a_model_without_a_finite_loss_is_left_without_a_step(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lesson, "withheld_loss", lambda _: float("nan"))
    found = recover(llama, tmp_path)
    assert (found.taken, found.kept, found.before, found.after) == (0, 0, None, None)
    assert "loss of the model that was given is not finite" in found.warning


def test_text_that_is_harder_than_what_is_withheld_is_no_divergence(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is text that a model writes where it was pruned on text of one domain."""
    monkeypatch.setattr(Lesson, "withheld_loss", lambda _: 1e-4)
    found = recover(llama, tmp_path)
    assert (found.taken, found.warning) == (found.steps, "")
    assert all(p.trained > 1e-2 for p in found.curve if p.trained is not None)


def test_a_run_that_diverges_goes_on_from_its_best_weights_at_a_smaller_rate(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prox24_deploy.config.options._RATES", (1e4, 1e3, 0.005))
    monkeypatch.setattr("prox24_deploy.config.options._MANY_STEPS", 1)
    monkeypatch.setattr("prox24_deploy.config.options._MANY_TOKENS", 1)
    options = replace(FAST, learning_rate=None, write=False)
    result = recover(replace(llama, options=options), tmp_path / "whole")
    assert [setback.rate for setback in result.setbacks] == [1e4, 1e3]
    assert all("the loss " in setback.reason for setback in result.setbacks)
    assert (result.learning_rate, result.warning) == (0.005, "")
    assert result.before is not None
    assert result.after is not None
    assert result.after < result.before
    steps = [point.step for point in result.curve]
    assert steps == sorted(set(steps))
    again = recover_directory(
        replace(llama, options=options),
        kept=tmp_path / "whole" / "kept", out=tmp_path / "again", progress=silent,
    )  # fmt: skip
    assert (again.setbacks, again.curve) == (result.setbacks, result.curve)
    monkeypatch.setattr("prox24_deploy.config.options._RATES", (1e4, 1e3))
    lost = recover(replace(llama, options=options), tmp_path / "lost")
    assert (lost.kept, lost.fitted, len(lost.setbacks)) == (0, None, 1)
    assert lost.warning.endswith("pass a smaller --recover-rate than 1000.")


def test_steps_that_only_harm_are_not_kept(llama: Recovery, tmp_path: Path) -> None:
    """A rate that is too large, but not so large that the loss leaves for good."""
    first = recover(replace(llama, options=replace(FAST, learning_rate=1e-9)), tmp_path / "a")
    assert (first.kept, first.after) == (0, first.before)
    given, left = tensors(llama.pruned.path), tensors(tmp_path / "a" / "out")
    assert all(torch.equal(given[name], left[name]) for name in given)


def test_without_memory_the_model_is_what_it_was(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Training, "_step", exhausted)
    result = recover(llama, tmp_path)
    assert (result.kept, result.after) == (0, None)
    assert "ran out of memory" in result.warning
    assert "--recover-checkpointing, --recover-optimizer adafactor" in result.warning
    given, left = tensors(llama.pruned.path), tensors(tmp_path / "out")
    assert all(torch.equal(given[name], left[name]) for name in given)


def test_another_fault_is_no_lack_of_memory(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Training, "_step", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        recover(llama, tmp_path)


def test_activations_computed_twice_give_the_same_weights(llama: Recovery, tmp_path: Path) -> None:
    options = replace(FAST, steps=3, write=False)
    plain = recover(replace(llama, options=options), tmp_path / "plain")
    twice = recover(
        replace(llama, options=replace(options, checkpointing=True)), tmp_path / "twice"
    )
    assert twice.curve == plain.curve


def test_text_is_written_only_where_the_given_text_would_be_read_often(
    llama: Recovery, tmp_path: Path
) -> None:
    few = recover(llama, tmp_path / "few")
    assert few.written is None
    many = recover(
        replace(llama, options=replace(FAST, steps=4, step_tokens=4096)), tmp_path / "many"
    )
    assert many.written is not None
    assert many.written.tokens >= 4 * 4096 / 3 - 4096
    alone = replace(FAST, steps=4, step_tokens=4096, write=False)
    assert recover(replace(llama, options=alone), tmp_path / "alone").written is None


def test_minutes_become_steps_once(llama: Recovery, tmp_path: Path) -> None:
    options = RecoverOptions(minutes=0.02, step_tokens=512)
    first = recover(replace(llama, options=options), tmp_path / "a")
    assert first.steps >= 1
    again = recover_directory(
        replace(llama, options=options),
        kept=tmp_path / "a" / "kept", out=tmp_path / "b", progress=silent,
    )  # fmt: skip
    assert again.steps == first.steps
    assert again.curve == first.curve


def mistimed(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let so many steps be planned, whatever the minutes allow."""
    monkeypatch.setattr("prox24_deploy.recovery.session._timed_steps", lambda *_: steps)


def test_minutes_hold_where_steps_take_longer_than_timed(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistimed(monkeypatch, 1000)
    options = RecoverOptions(minutes=0.03, step_tokens=512, learning_rate=0.005, write=False)
    result = recover(replace(llama, options=options), tmp_path)
    # They are planned anew at the first check.
    assert 50 < result.taken == result.steps < 1000
    assert result.curve[-1].step == result.steps


def test_minutes_are_used_where_steps_take_less_than_timed(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistimed(monkeypatch, 40)
    options = RecoverOptions(minutes=0.5, step_tokens=64, learning_rate=0.005, write=False)
    result = recover(replace(llama, options=options), tmp_path)
    source = result.calibration
    given = source.tokens * (source.samples - result.withheld) // source.samples
    # None is read more than three times, and there are as many checks as for so many steps.
    assert result.taken == result.steps == 3 * given // 64 > 40
    assert len(result.curve) <= 23
    assert result.curve[-1].step == result.steps


def test_the_first_step_is_no_measure_of_the_others(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, paces = [0.4], []
    gradient = Lesson.gradient

    def late(*asked: Any) -> float:
        time.sleep(slow.pop() if slow else 0.0)
        return gradient(*asked)

    def within(_: float, pace: Pace, *__: Any) -> int:
        paces.append(pace)
        return 2

    monkeypatch.setattr(Lesson, "gradient", late)
    monkeypatch.setattr("prox24_deploy.recovery.session.steps_within", within)
    options = RecoverOptions(minutes=0.001, step_tokens=512, write=False)
    recover(replace(llama, options=options), tmp_path)
    assert len(paces) == 1
    assert paces[0].step < 0.4


def test_a_run_that_was_planned_anew_goes_on_with_that(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    planned = []

    def stop(label: str, _: int, total: int) -> None:
        if label == "recover" and total != 1000:
            planned.append(total)
            raise StoppedError

    mistimed(monkeypatch, 1000)
    options = RecoverOptions(minutes=0.02, step_tokens=512, write=False)
    asked = replace(llama, options=options)
    with pytest.raises(StoppedError):
        recover_directory(asked, kept=tmp_path / "kept", out=tmp_path / "out", progress=stop)
    # The rate is that of the steps that were planned at first.
    monkeypatch.setattr("prox24_deploy.config.options._MANY_STEPS", 1)
    result = recover(asked, tmp_path)
    assert [result.steps] == planned
    assert result.learning_rate == 0.0029


def test_a_run_that_ended_early_goes_no_further(llama: Recovery, tmp_path: Path) -> None:
    # So small a rate moves no weight by a bit.
    options = RecoverOptions(steps=100, step_tokens=512, learning_rate=1e-12, write=False)
    first = recover(replace(llama, options=options), tmp_path / "a")
    assert first.taken < 100
    again = recover_directory(
        replace(llama, options=options),
        kept=tmp_path / "a" / "kept", out=tmp_path / "b", progress=silent,
    )  # fmt: skip
    assert (again.taken, again.curve) == (first.taken, first.curve)


def test_a_teacher_of_another_kind_is_refused(
    llama: Recovery, tmp_path: Path, tiny_gpt2: Path, tiny_llama: Path
) -> None:
    with pytest.raises(ModelDirError, match=r"is a GPT2LMHeadModel, and .* a LlamaForCausalLM; pa"):
        recover(replace(llama, dense=open_model_dir(tiny_gpt2)), tmp_path)
    pruned = llama.pruned
    other = replace(pruned, config={**pruned.config, "vocab_size": 7})
    with pytest.raises(ModelDirError, match=r"a vocabulary of 260 tokens, and .* of 7; pass the "):
        recover(replace(llama, pruned=other), tmp_path)
    less = replace(pruned, tensors=dict(list(pruned.tensors.items())[1:]))
    with pytest.raises(
        ModelDirError, match=r"Tensor \S+ has \d+ values in .* and 0 in .*; pass the mod"
    ):
        recover(replace(llama, pruned=less), tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "head_dim 4, .* 8"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', .* 'silu'"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta 500000.0"),
        ({"attention_dropout": 0.5, "dtype": "float32", "transformers_version": "5.0.0"}, ""),
    ],
)
def test_a_teacher_that_computes_otherwise_is_refused(
    llama: Recovery, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(llama.dense.path, copy)
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **change}))
    dense = open_model_dir(copy)
    if not said:
        require_pair(dense, llama.pruned, llama.recipe)
        return
    with pytest.raises(ModelDirError, match=f"The teacher .* has .*{said}.*; pass the model that"):
        require_pair(dense, llama.pruned, llama.recipe)


def test_a_teacher_with_unlike_weights_is_a_warning(
    llama: Recovery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require_pair(llama.dense, llama.pruned, llama.recipe)
    assert not caplog.text
    copy = tmp_path / "copy"
    shutil.copytree(llama.dense.path, copy)
    generator = torch.Generator().manual_seed(3)
    for file in copy.glob("*.safetensors"):
        strange = {
            name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for name, tensor in load_file(file).items()
        }
        save_file(strange, file, {"format": "pt"})
    require_pair(open_model_dir(copy), llama.pruned, llama.recipe)
    assert f"have nothing to do with those of the teacher {copy}. Unless one of" in caplog.text


def test_other_tokens_are_refused(llama: Recovery, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(llama.pruned.path, copy)
    file = copy / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("[PAD]", "[GAP]"), encoding="utf-8")
    with pytest.raises(ModelDirError, match="have other tokens; pass the model that"):
        recover(replace(llama, pruned=open_model_dir(copy)), tmp_path)


def test_a_student_that_is_not_sparse_is_refused(llama: Recovery, tmp_path: Path) -> None:
    with pytest.raises(SparsityLostError, match=r"Layer model.layers.0.self_attn.q_proj of .* 2:4"):
        recover(replace(llama, pruned=llama.dense), tmp_path)
    # By its files alone.
    with pytest.raises(SparsityLostError, match=r"Layer model.layers.0.self_attn.q_proj of .* 2:4"):
        require_sparse(llama.dense, llama.recipe)
    require_sparse(llama.pruned, llama.recipe)


def test_too_little_text_to_withhold_some_is_refused(llama: Recovery, tmp_path: Path) -> None:
    source = replace(llama.calibration.source, samples=7)
    few = replace(llama.calibration, source=source)
    with pytest.raises(CalibrationError, match=r"at least 8 calibration samples, .* got 7; pass"):
        recover(replace(llama, calibration=few), tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "got None steps and None minutes"),
        ({"steps": 3, "minutes": 1.0}, "got 3 steps and 1.0 minutes"),
        ({"steps": 0}, "above 0, got 0 steps"),
        ({"steps": 1, "learning_rate": 0.0}, "above 0, got 0.0 and 1.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RecoverOptions(**options).require_usable()
