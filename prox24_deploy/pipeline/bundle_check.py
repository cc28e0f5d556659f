"""2:4 in a bundle: the pruned directory and the sparse twin proven, the dense twin looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prox24_deploy.bundle.layout import ONNX, PRUNED, RECOVERED, lies_below
from prox24_deploy.bundle.manifest import Manifest, read_manifest
from prox24_deploy.core.errors import BundleError
from prox24_deploy.graph.check.check import check_path
from prox24_deploy.graph.check.judgement import CheckReport, require_24

_SPARSE, _DENSE = f"{ONNX}/sparse", f"{ONNX}/dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleCheck:
    """What was found in each part of a bundle that holds weights, by its folder.

    `parts` has what must be proven, `dense` what is no more than looked at, None where nothing was
    exported.
    """

    path: str
    parts: Mapping[str, CheckReport]
    dense: CheckReport | None

    @property
    def conclusion(self) -> str:
        """What that says, in one sentence, where every part is proven."""
        counts = [f"{len(report.proven)} weights of {part}" for part, report in self.parts.items()]
        said = f"Proven: {' and '.join(counts)} are 2:4, all that must be"
        if self.dense is None:
            return f"{said}; nothing was exported yet."
        weights = [check for check in self.dense.tensors if check.expected]
        same = sum(check.is_24 for check in weights)
        return f"{said}; of the dense twin {same} of {len(weights)} are."


def check_bundle(root: Path, ignore: Sequence[str], axes: Mapping[str, int]) -> BundleCheck:
    """Check every weight in a bundle, by files that hold nothing but what they say.

    Raises:
        BundleError: it holds no pruned model, lacks a file that a stage left, or has a folder of
            weights that is none of a stage.
        UsageError: a file of it is damaged.
    """
    folders = _folders_of(root, read_manifest(root))
    proven = [name for name in folders if name != _DENSE]
    return BundleCheck(
        path=str(root),
        parts={name: check_path(root / name, ignore, axes) for name in proven},
        dense=check_path(root / _DENSE) if _DENSE in folders else None,
    )


def _folders_of(root: Path, manifest: Manifest) -> list[str]:
    """The folders of weights that the stages of a bundle left there, all of their files with them.

    One that is gone would be left out of what is proven, and one that came from elsewhere be in it.
    """
    folders = []
    for folder in (PRUNED, RECOVERED, _SPARSE, _DENSE):
        names = [name for name in manifest.files if lies_below(name, folder)]
        if absent := [name for name in names if not (root / name).is_file()]:
            raise BundleError(
                f"Bundle {root} has lost {absent[0]}, so that nothing is proven of it; restore it, "
                "or run the same build again."
            )
        if names:
            folders.append(folder)
        elif (root / folder).is_dir():
            raise BundleError(
                f"Bundle {root} has {folder}/, which no stage of it made; move it out, or check it "
                "by itself."
            )
    if not {PRUNED, RECOVERED} & {*folders}:
        raise BundleError(f"Bundle {root} holds no {PRUNED}/; run prune first.")
    return folders


def require_proven(found: BundleCheck) -> None:
    """Do nothing if every part is proven 2:4.

    Raises:
        SparsityLostError, SparsityUnprovenError: names the first weight that is not.
    """
    for report in found.parts.values():
        require_24(report)
