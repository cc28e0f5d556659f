"""What the compiled prox does to the process that it runs in."""

import subprocess
import sys


def test_the_thread_count_of_torch_stays() -> None:
    """In a fresh process: Numba sets it when it starts its pool, for the whole OpenMP runtime."""
    program = (
        "import torch; from prox24_deploy.pruning.solvers.prox import COMPILED_FROM, prox_24;"
        "torch.set_num_threads(1); prox_24(torch.ones(COMPILED_FROM, 4), 0.5);"
        "assert torch.get_num_threads() == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
