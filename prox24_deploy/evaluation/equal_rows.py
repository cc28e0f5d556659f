"""Whether a model gives equal rows of one batch equal outputs, as an engine may fail to.

No reference is needed to see that fault: engines of TensorRT gave four answers to four times the
same input (issues 4813 and 4796 of github.com/NVIDIA/TensorRT), while a batch of one was right.
"""

import torch
from torch import Tensor, nn

from prox24_deploy.core.accuracy import RowsCheck
from prox24_deploy.core.types import DType, Twin
from prox24_deploy.evaluation.parity import METRIC_TOLERANCES
from prox24_deploy.model.batch import Batch


@torch.no_grad()
def equal_rows(model: nn.Module, batch: Batch, *, rows: int, dtype: DType, twin: Twin) -> RowsCheck:
    """Run the first sample of a batch `rows` times in one, and compare the outputs.

    A difference is tolerated as far as the rounding of `dtype` may explain it, for the last rows
    of a batch may run on another kernel than the first.
    """
    inputs = {
        name: tensor[:1].expand(rows, *tensor.shape[1:]) for name, tensor in batch.inputs.items()
    }
    outputs = vars(model(**inputs)).values()
    difference = max(_spread(output) for output in outputs if isinstance(output, Tensor))
    tolerance = METRIC_TOLERANCES[dtype]
    return RowsCheck(
        twin=twin,
        rows=rows,
        difference=difference,
        tolerance=tolerance,
        passed=difference <= tolerance,
    )


def _spread(output: Tensor) -> float:
    largest = output.abs().max()
    return float((output.amax(0) - output.amin(0)).max() / largest) if largest else 0.0
