"""Stage: train what pruning left of a model until it does what the dense one does."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import nn

from prox24_deploy.config.options import RecoverOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.host import GIB
from prox24_deploy.core.recovery import RecoverResult
from prox24_deploy.core.types import Progress
from prox24_deploy.data.written import FIRST_TO_LEARN, author_of
from prox24_deploy.model.batch import Samples, padding_id
from prox24_deploy.model.checkpoint import renamed_tensors, write_pruned
from prox24_deploy.model.config_file import whole_number
from prox24_deploy.model.directory import ModelDir, load_model
from prox24_deploy.model.dtypes import settled_dtype
from prox24_deploy.model.processors import load_tokenizer
from prox24_deploy.recovery.objective import loss_name
from prox24_deploy.recovery.pair import require_pair
from prox24_deploy.recovery.processes import Crew, run_together
from prox24_deploy.recovery.schedule import Schedule, require_samples
from prox24_deploy.recovery.session import Recovered, Session, recover_model, state_file
from prox24_deploy.recovery.student import Trained, find_trained, put, values_of
from prox24_deploy.recovery.training import Outcome

log = logging.getLogger(__name__)

_RECOVERED = TypeAdapter(Recovered)
# What several processes came to, beside the state that they leave.
_OUTCOME = "outcome.json"
_NOBODY_ELSE = Crew()
# What torch says where the memory of the machine, and not of a GPU, does not do.
_NO_MEMORY = "DefaultCPUAllocator"
_MAYBE_MEMORY = (MemoryError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What is recovered from what.

    Attributes:
        dense: the model that `pruned` was pruned from.
        pruned: the model to train.
        recipe: of their family.
        calibration: samples to train on, an eighth of them withheld.
        options: budget and schedule.
        seed: of the order of samples, and of what is written.
        device: where both models run.
        needed: bytes that this takes, as `require_memory` estimated; 0 if nobody did.
        texts: folder in which what the dense model writes is kept for others; None for none.
    """

    dense: ModelDir
    pruned: ModelDir
    recipe: Recipe
    calibration: Samples
    options: RecoverOptions
    seed: int
    device: torch.device
    needed: int = 0
    texts: Path | None = None

    def require_untouched(self) -> None:
        """Refuse directories that were written since they were opened.

        Raises:
            ModelDirError: names the first file.
        """
        self.dense.require_untouched()
        self.pruned.require_untouched()


def recover_directory(
    asked: Recovery, *, kept: Path, out: Path, progress: Progress
) -> RecoverResult:
    """Recover a pruned model directory into `out`, a folder that does not exist yet.

    A run that diverges or runs out of memory ends with the weights that it was given, and with a
    warning in the record.

    Args:
        asked: the models, samples and options.
        kept: folder for what an interrupted run goes on from.
        out: receives weights, configuration and tokenizer.
        progress: called with (label, done, total).

    Raises:
        CalibrationError: there are too few samples.
        ModelDirError: one model was not pruned from the other, or was written meanwhile.
        SparsityLostError: the pruned model is not 2:4, or a weight read back from disk is not.
        UsageError: the model has no 2:4 layer, or an option means nothing.
    """
    began = time.perf_counter()
    asked.options.require_usable()
    require_samples(asked.calibration)
    require_pair(asked.dense, asked.pruned, asked.recipe)
    if asked.options.processes > 1:
        found, opened, trained = _together(asked, kept, began, progress)
    else:
        sparse, opened = _opened(asked, asked.device)
        trained = _trained(asked, sparse, opened)
        found = recovered_alone(asked, sparse, trained, kept, began, progress)
    if found.outcome.failure:
        log.warning("%s", found.outcome.failure)
    return _record(asked, found, trained, _write(opened, trained, out), began)


def _opened(asked: Recovery, device: torch.device) -> tuple[nn.Module, ModelDir]:
    """The pruned model, and its directory with the names that it has there."""
    sparse = load_model(asked.pruned, asked.recipe, device)
    return sparse, replace(
        asked.pruned, renamed=renamed_tensors(asked.pruned, sparse, asked.recipe)
    )


def _trained(asked: Recovery, sparse: nn.Module, opened: ModelDir) -> tuple[Trained, ...]:
    """What is trained of the pruned model."""
    return find_trained(sparse, opened, asked.recipe, embeddings=asked.options.embeddings)


def recovered_alone(
    asked: Recovery,
    sparse: nn.Module,
    trained: Sequence[Trained],
    kept: Path,
    began: float,
    progress: Progress,
) -> Recovered:
    """Train parameters of an opened model in this process; without memory it is as it was."""
    first = values_of(trained, stored=True)
    try:
        return _alone(asked, sparse, trained, kept, began, progress)
    except _MAYBE_MEMORY as error:
        found = _without_memory(asked.options, error)
        put(trained, first)
        return found


def _without_memory(options: RecoverOptions, error: BaseException) -> Recovered:
    """What came of a recovery that ended with an error for want of memory; raises any other."""
    for_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not for_memory and _NO_MEMORY not in str(error):
        raise error
    steps = options.steps
    failure = (
        "Recovery ran out of memory, so that the model is kept as it was; pass "
        "--recover-checkpointing, --recover-optimizer adafactor, a smaller --recover-tokens, "
        "or a device with more memory."
    )
    return Recovered(
        schedule=Schedule(steps=steps or 0, step_tokens=0, check_every=1),
        outcome=Outcome(failure=failure),
        withheld=0,
        written=None,
        rate=options.learning_rate or 0.0,
    )


def _alone(
    asked: Recovery,
    sparse: nn.Module,
    trained: Sequence[Trained],
    kept: Path,
    began: float,
    progress: Progress,
    crew: Crew = _NOBODY_ELSE,
) -> Recovered:
    """Train in this process, which may be one of a crew."""
    if asked.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(asked.device)
    session = _session(asked, sparse, trained, kept, began)
    found = recover_model(replace(session, crew=crew), progress)
    if asked.device.type != "cuda":
        return found
    return replace(found, peak_gib=torch.cuda.max_memory_allocated(asked.device) / GIB)


def _together(
    asked: Recovery, kept: Path, began: float, progress: Progress
) -> tuple[Recovered, ModelDir, tuple[Trained, ...]]:
    """Train in several processes, and take the best weights from the state that they leave.

    Each has a model of its own. This one opens it behind them, on the CPU and to write it.
    """
    try:
        task = partial(_member, asked, kept, began)
        run_together(task, asked.options.processes, asked.device, progress)
        found = _RECOVERED.validate_json((kept / _OUTCOME).read_bytes())
    except _MAYBE_MEMORY as error:
        found = _without_memory(asked.options, error)
    sparse, opened = _opened(asked, torch.device("cpu"))
    trained = _trained(asked, sparse, opened)
    if found.outcome.kept and (state := state_file(kept).load(len(trained))):
        put(trained, state.best)
    return found, opened, trained


def _member(
    asked: Recovery, kept: Path, began: float, crew: Crew, device: torch.device, progress: Progress
) -> None:
    """What each of several processes does."""
    own = replace(asked, device=device)
    sparse, opened = _opened(own, device)
    trained = _trained(own, sparse, opened)
    found = _alone(own, sparse, trained, kept, began, progress, crew)
    if crew.leads:
        write_atomic(kept / _OUTCOME, _RECOVERED.dump_json(found))


def _session(
    asked: Recovery, sparse: nn.Module, trained: Sequence[Trained], kept: Path, began: float
) -> Session:
    """Open what the session needs beside the model to train."""
    recipe, directory = asked.recipe, asked.dense
    dense = load_model(directory, recipe, asked.device)
    if asked.device.type == "cuda" and recipe.kind.writes_text:
        # It is not trained, and loses nothing in the precision that it is stored in.
        dense = dense.to(getattr(torch, settled_dtype(directory, recipe, None)))
    author, padding = None, 0
    if recipe.kind.decoder_alone:
        tokenizer = load_tokenizer(directory)
        padding = padding_id(tokenizer)
        length = int(asked.calibration.batches[0].real.shape[1])
        if asked.options.write:
            author = author_of(
                dense,
                tokenizer,
                length=length,
                seed=asked.seed,
                folder=kept,
                first=FIRST_TO_LEARN,
            )
            if author is not None and asked.texts is not None:
                author = author.keeping(asked.texts, directory.sha256)
            if author is None:
                log.warning(
                    "%s names no token that a text starts with, so that the model writes no text "
                    "to be trained on.", directory.path,
                )  # fmt: skip
    vocabulary = whole_number(directory.config, "vocab_size", 1)
    return Session(
        dense=dense,
        sparse=sparse,
        trained=trained,
        recipe=recipe,
        calibration=asked.calibration,
        options=asked.options,
        vocabulary=vocabulary if recipe.kind.writes_text else 1,
        author=author,
        padding=padding,
        seed=asked.seed,
        folder=kept,
        guard=asked.require_untouched,
        began=began,
    )


def _record(
    asked: Recovery, found: Recovered, trained: Sequence[Trained], digest: str, began: float
) -> RecoverResult:
    outcome, device = found.outcome, asked.device
    return RecoverResult(
        loss=loss_name(asked.recipe.task, asked.dense.config),
        steps=found.schedule.steps,
        step_tokens=found.schedule.step_tokens,
        taken=outcome.taken,
        kept=outcome.kept,
        before=outcome.before,
        after=outcome.after,
        curve=outcome.curve,
        learning_rate=found.rate,
        layers=sum(each.zeros is not None for each in trained),
        vectors=sum(each.is_vector for each in trained),
        embeddings=sum(each.is_embedding for each in trained),
        optimizer=asked.options.optimizer,
        processes=asked.options.processes,
        parameters=sum(each.free for each in trained),
        calibration=asked.calibration.source,
        withheld=found.withheld,
        written=found.written,
        warning=outcome.failure,
        device=device.type,
        peak_gib=found.peak_gib,
        needed_gib=asked.needed / GIB if asked.needed else None,
        state_sha256=digest,
        setbacks=outcome.setbacks,
        fitted=outcome.fitted,
        seconds=time.perf_counter() - began,
    )


def _write(directory: ModelDir, trained: Sequence[Trained], out: Path) -> str:
    """Write the model as it now is, and prove its 2:4 layers on the file."""
    sparse, dense, axes = {}, {}, {}
    for each in trained:
        for name in each.names:
            value = each.parameter.detach().to(each.dtype)
            if each.axis is None:
                dense[name] = value
            else:
                sparse[name], axes[name] = value, each.axis
    return write_pruned(directory, sparse, out, axes=axes, dense=dense)
