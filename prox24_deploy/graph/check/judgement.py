"""Which of the weights that were found must be 2:4, and the verdict over a file or folder.

A file may declare which of its weights are meant to be 2:4. Then exactly those are expected to be,
and one that is missing is not proven. Of a file that declares nothing every weight is expected that
the caller does not ignore, so a dense model does not pass by saying nothing. A verdict of 2:4 needs
every expected weight to be proven, and at least one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from prox24_deploy.core.errors import SparsityLostError, SparsityUnprovenError
from prox24_deploy.core.records import TensorCheck

# A sentence is read by people, and a file may name a tensor by a megabyte.
_MOST_CHARACTERS = 200
_WRITE = "write the file again from the pruned weights"
_PRUNE = "prune the model first, or ignore the weights that are meant to stay dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """2:4 check of a file or folder; `declared` says that it names its own 2:4 weights.

    `unread` are files of a folder that may hold weights too, and were not looked at.
    """

    path: str
    declared: bool
    tensors: tuple[TensorCheck, ...]
    unread: tuple[str, ...] = ()

    @property
    def proven(self) -> tuple[TensorCheck, ...]:
        """The weights that are expected to be 2:4 and are; one without elements shows nothing."""
        return tuple(c for c in self.tensors if c.expected and c.is_24 and all(c.shape))

    @property
    def violations(self) -> tuple[TensorCheck, ...]:
        """The weights that are expected to be 2:4 and were read and are not."""
        return tuple(c for c in self.tensors if c.expected and not c.is_24 and not c.unproven)

    @property
    def unproven(self) -> tuple[TensorCheck, ...]:
        """The weights that are expected to be 2:4 and cannot be shown to be, or not to be."""
        return tuple(check for check in self.tensors if check.expected and check.unproven)

    @property
    def conclusion(self) -> str:
        """What that says, in one sentence, where `require_24` does nothing."""
        rest = len(self.tensors) - len(self.proven)
        who = "it declares to be" if self.declared else "must be"
        also = f"; {rest} others need not be" if rest else ""
        return f"Proven: all {len(self.proven)} weights that {who} 2:4 are{also}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A checked weight and the names under which a declaration may mean it.

    A candidate that is `never` expected is listed, but is no weight. `made_of` are the names of
    all tensors that it is computed from.
    """

    check: TensorCheck
    keys: frozenset[str]
    never: bool = False
    made_of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scan:
    """What one file holds and declares: names of tensors (safetensors) or of modules (ONNX)."""

    declared: frozenset[str] | None
    candidates: tuple[Candidate, ...]
    declares_tensors: bool


def judge(scans: Sequence[Scan], ignore: Sequence[str]) -> tuple[TensorCheck, ...]:
    """Decide which weights of one model are expected, and add the declared ones it lacks."""
    declarations = [scan.declared for scan in scans if scan.declared is not None]
    candidates = [candidate for scan in scans for candidate in scan.candidates]
    if not declarations:
        return tuple(
            replace(each.check, expected=not each.never and not _matches(each, ignore))
            for each in candidates
        )
    declared = frozenset[str]().union(*declarations)
    checks = [replace(each.check, expected=bool(each.keys & declared)) for each in candidates]
    found = frozenset[str]().union(*(each.keys for each in candidates))
    return (*checks, *(_missing(name, scans[0]) for name in sorted(declared - found)))


def require_24(report: CheckReport) -> None:
    """Do nothing if every expected weight is proven 2:4, and there is one.

    Raises:
        SparsityLostError: names the first weight that is not 2:4, where, and how many others.
        SparsityUnprovenError: names the first weight that is neither shown nor refuted to be 2:4,
            or says that there was nothing to prove.
    """
    require_expected(report)
    if not report.proven:
        said = (
            "what it declares names no weight of its own"
            if report.declared
            else "all of its weights are ignored"
        )
        raise SparsityUnprovenError(
            f"{report.path} proves nothing: {said}; pass the file or the folder that holds the "
            "pruned weights."
        )


def require_expected(report: CheckReport) -> None:
    """Do nothing if every expected weight is proven 2:4, also where none is expected.

    Raises:
        SparsityLostError: names the first weight that is not 2:4, where, and how many others.
        SparsityUnprovenError: names the first weight that is neither shown nor refuted to be 2:4.
    """
    lost, unproven = report.violations, report.unproven
    if lost:
        where = f" along axis {lost[0].axis}" if lost[0].axis >= 0 else ""
        more = f", {len(unproven)} not proven" if unproven else ""
        raise SparsityLostError(
            f"In {report.path}, {_named(lost[0])} is not 2:4{where}: {lost[0].reason}"
            f"{_others(lost)}{more}; {_WRITE if report.declared else _PRUNE}."
        )
    if unproven:
        raise SparsityUnprovenError(
            f"In {report.path}, {_named(unproven[0])} is not proven 2:4: {unproven[0].reason}"
            f"{_others(unproven)}; {unproven[0].remedy or _WRITE}."
        )


def _matches(candidate: Candidate, globs: Iterable[str]) -> bool:
    names = {candidate.check.tensor, candidate.check.module, *candidate.made_of} - {""}
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def _missing(name: str, scan: Scan) -> TensorCheck:
    """Stand-in for a declared weight that is not in the file; `name` is what was declared."""
    return TensorCheck(
        tensor=name if scan.declares_tensors else "",
        module=name.removesuffix(".weight") if scan.declares_tensors else name,
        node="",
        op_type="",
        dtype="",
        shape=(),
        axis=-1,
        density=0.0,
        is_24=False,
        expected=True,
        first_violation=None,
        reason="it is declared as 2:4 but the file has no such weight",
        unproven=True,
        remedy=_WRITE,
    )


def _named(check: TensorCheck) -> str:
    what = f"tensor {_short(check.tensor)!r}" if check.tensor else "the weight"
    return f"{what} of module {_short(check.module)!r}" if check.module else what


def _short(name: str) -> str:
    return name if len(name) <= _MOST_CHARACTERS else f"{name[:_MOST_CHARACTERS]}..."


def _others(checks: Sequence[TensorCheck]) -> str:
    rest = len(checks) - 1
    return f" ({rest} other weight{'s' if rest > 1 else ''} too)" if rest else ""
