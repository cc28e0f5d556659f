"""Second moments of layer inputs: plain, cross and dense Gram matrices."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prox24_deploy.pruning.ranks import ALONE, Ranks
from prox24_deploy.pruning.solvers.problem import missing_tokens

# Products are taken in as many strips, for that of a wide layer takes gigabytes; of a symmetric one
# each begins at its diagonal, which with four of them takes ten sixteenths of the multiplications.
_STRIPS = 4


@dataclass(slots=True)
class SecondMoments:
    """Sums over tokens for one group of layers that share their input.

    Products are taken in float32, whatever the model computes in, on a GPU of factors that are
    rounded to TF32 (`products`), and summed in float64.

    Attributes:
        cross: X_dᵀX_p, (d, d), dense against pruned inputs of the same tokens.
        tokens: rows summed.
        routed: whether a router decides which tokens these are, so that they may be few.
    """

    cross: Tensor
    _pruned: "_Symmetric"
    _dense: "_Symmetric"
    tokens: int = 0
    routed: bool = False

    @classmethod
    def empty(cls, features: int, device: torch.device, *, routed: bool = False) -> "SecondMoments":
        """All zero, for inputs with `features` columns."""
        cross = torch.zeros(features, features, dtype=torch.float64, device=device)
        pruned, dense = (_Symmetric(torch.zeros_like(cross)) for _ in "12")
        return cls(cross, pruned, dense, routed=routed)

    @property
    def pull(self) -> float:
        """Part of what a layer is solved on that pulls it to its dense weights, 0 to 1.

        It is 0 but for an expert with too few tokens, see `missing_tokens`.
        """
        missing = missing_tokens(len(self._pruned.total), self.tokens) if self.routed else 0.0
        return missing / (missing + self.tokens) if missing else 0.0

    def for_solving(self, *, cross: bool) -> tuple[Tensor, Tensor | None, int]:
        """X_pᵀX_p, X_dᵀX_p if asked for, (d, d), with tokens that are missing, and their number.

        Tokens that an expert lacks have the mean square of the others in every feature, and no two
        features of them go together: on these the best of the kept weights are the dense ones.
        Where no feature is ever active that square is 1.
        """
        tokens = max(self.tokens, 1)
        if not self.pull:
            return self.pruned, self.cross if cross else None, tokens
        found = [self.pruned / tokens, *([self.cross / tokens] if cross else [])]
        size = found[0].diagonal().mean()
        added = self.pull * torch.where(size == 0, 1.0, size)
        for each in found:
            each *= 1 - self.pull
            each.diagonal().add_(added)
        return found[0], found[1] if cross else None, 1

    @property
    def pruned(self) -> Tensor:
        """X_pᵀX_p, (d, d), inputs in the partly pruned model."""
        return self._pruned.whole()

    @property
    def dense(self) -> Tensor:
        """X_dᵀX_d, (d, d)."""
        return self._dense.whole()

    def add(self, dense: Tensor, pruned: Tensor) -> None:
        """Add the rows of one batch, both (tokens, d), padding already removed."""
        dense, pruned = dense.float(), pruned.float()
        self._pruned.add(pruned)
        self._dense.add(dense)
        for strip in _strips(len(self.cross)):
            self.cross[strip] += dense[:, strip].T @ pruned
        self.tokens += len(pruned)

    def sum_over(self, ranks: Ranks) -> None:
        """Add what the other processes of a run have summed."""
        if ranks.count > 1:
            ranks.sum_in_place(self._pruned.total, self.cross, self._dense.total)
            self.tokens = int(ranks.total(self.tokens))
            self._pruned.mirror()
            self._dense.mirror()

    def errors(self, before: Mapping[str, Tensor], ranks: Ranks = ALONE) -> "LayerErrors":
        """What tells errors of layers (rows, d) by name, without the sums over dense inputs.

        Each process has what is of its rows.
        """
        references, mixed = {}, {}
        for name, weight in before.items():
            own = weight[ranks.rows(len(weight))].double()
            references[name] = ranks.total(_form(own, self.dense))
            mixed[name] = own @ self.cross
        return LayerErrors(references, mixed, self, ranks)

    def give_up(self, *, cross: bool) -> None:
        """Free the sum over dense inputs, which errors alone need, and the cross sum if asked."""
        self._dense.total = self.cross.new_zeros(0, 0)
        if cross:
            self.cross = self._dense.total


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """What layers gave before they were pruned, to be compared with what they give then.

    Attributes:
        references: ‖X_d W0ᵀ‖² by name.
        mixed: W0 X_dᵀX_p by name, float64, of the rows of this process, (its rows, d).
        moments: of the inputs; only their sum over pruned inputs is read.
        ranks: the processes that share the rows.
    """

    references: Mapping[str, float]
    mixed: Mapping[str, Tensor]
    moments: SecondMoments
    ranks: Ranks

    def of(self, name: str, after: Tensor) -> float:
        """‖X_d W0ᵀ - X_p Wᵀ‖² / ‖X_d W0ᵀ‖² for weights (rows, d); 0 where the dense output is 0.

        All processes must call it.
        """
        reference, own = self.references[name], after[self.ranks.rows(len(after))].double()
        squares = _form(own, self.moments.pruned)
        rest = self.ranks.total(squares - 2 * float((self.mixed[name] * own).sum()))
        # Rounding may leave a tiny negative sum; NaN stays NaN, so that nothing broken looks good.
        return max(reference + rest, 0.0) / reference if reference != 0 else 0.0


def _form(rows: Tensor, moments: Tensor) -> float:
    """tr(W H Wᵀ), for rows W (n, d), without a third matrix of their size."""
    return float((rows @ moments).mul_(rows).sum())


@dataclass(slots=True)
class _Symmetric:
    """A sum of XᵀX of which only strips from the diagonal on are computed, (d, d), float64."""

    total: Tensor
    _mirrored: bool = field(default=True)

    def add(self, rows: Tensor) -> None:
        for strip in _strips(len(self.total)):
            self.total[strip, strip.start :] += rows[:, strip].T @ rows[:, strip.start :]
        self._mirrored = False

    def whole(self) -> Tensor:
        if not self._mirrored:
            self.mirror()
        return self.total

    def mirror(self) -> None:
        for strip in _strips(len(self.total)):
            self.total[strip.stop :, strip] = self.total[strip, strip.stop :].T
        self._mirrored = True


def _strips(features: int) -> list[slice]:
    width = -(-features // _STRIPS)
    starts = range(0, features, width)
    return [slice(start, min(start + width, features)) for start in starts]
