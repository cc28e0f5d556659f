"""The stages of a build, a module each: what each depends on, leaves behind, and calls.

Every module has `STAGE`, and `run`, which gathers the inputs and hands them over. The inputs of a
stage are one frozen object, its key is the digest of that object, and its work sees nothing else.
torch and the engines are imported by the stage that needs them.
"""

from prox24_deploy.pipeline.stages import (
    accuracy,
    bench,
    compile,
    evaluate,
    export,
    prune,
    quantize,
    recover,
    report,
    tasks,
    write,
)

__all__ = [
    "accuracy",
    "bench",
    "compile",
    "evaluate",
    "export",
    "prune",
    "quantize",
    "recover",
    "report",
    "tasks",
    "write",
]
