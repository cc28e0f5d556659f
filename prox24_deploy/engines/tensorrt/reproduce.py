"""Write a shell script that makes and times the engines of a bundle without us.

Its commands are those of NVIDIA alone: `polygraphy` and `trtexec`, or `tensorrt_rtx`. So whoever
doubts a figure can ask NVIDIA about it with a script that they can run.

`polygraphy` was run so for TensorRT-RTX; `trtexec` and `tensorrt_rtx` come with archives that could
not be had: their options are those of their documentation, and were not run.
"""

import glob
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from prox24_deploy.engines.tensorrt.job import GIB, Job
from prox24_deploy.engines.tensorrt.library import SWITCH, TITLES

Shapes = Mapping[str, Sequence[int]]

_HEAD = """\
#!/bin/sh
# Makes the engines of this bundle again and times them, by tools of NVIDIA alone:
#   polygraphy  pip install polygraphy=={polygraphy}
#   {tool}  {source}
#
#   sh {script} [OUT]
#
# Engines, layers, times and logs go to OUT, a new folder unless given; the bundle is left as it is.
# It was built with {title} {version} for {device}.
#
# Each engine is built twice, by polygraphy as in the bundle and by {tool}, which times its own.
# {tool} runs one engine after the other, where the bundle's latencies were taken in turns: compare
# GPU Compute Time. As there, inputs lie on the GPU, and no CUDA graph is captured.
set -eu
out=${{1:-$(mktemp -d)}}
mkdir -p -- "$out"
out=$(cd -- "$out" && pwd)
cd -- "$(dirname -- "$0")/{root}"
failed=0
run() {{
    log=$out/$1.log
    shift
    echo "$*"
    "$@" >"$log" 2>&1 || {{ failed=1; tail -n 3 "$log"; echo "That failed, see $log"; }}
}}
"""
_TAIL = """
echo "What was said of sparse kernels, and how long the engines take:"
grep -H -e '(Sparsity)' -e 'GPU Compute Time: ' "$out"/*.log || true
echo "All of it is in $out"
exit "$failed"
"""
_SOURCES = {
    "trtexec": "from an archive, a package or a container of TensorRT; the wheels have none",
    "tensorrt_rtx": "from an archive of TensorRT-RTX; the wheels have none",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One engine: what to call it, how it was built, and the shapes of inputs to time it on.

    The ONNX file of the job is that within the bundle.
    """

    name: str
    job: Job
    timed: tuple[Shapes, ...]


def reproduction(
    builds: Sequence[Build], *, script: str, version: str, polygraphy: str, device: str
) -> str:
    """The script.

    Args:
        builds: the engines of one backend, at least one.
        script: path of the script within the bundle.
        version: of the library that built them.
        polygraphy: version of Polygraphy.
        device: that they were built for, in words.
    """
    library = builds[0].job.library
    tool = "trtexec" if library == "tensorrt" else "tensorrt_rtx"
    head = _HEAD.format(
        polygraphy=polygraphy,
        tool=tool,
        source=_SOURCES[tool],
        script=script,
        title=TITLES[library],
        version=_line(version),
        device=_line(device),
        root="/".join(".." for _ in PurePosixPath(script).parent.parts),
    )
    switch = f"export {SWITCH}={int(library == 'tensorrt_rtx')}\n"
    major = int(version.partition(".")[0])
    parts = [_build(build, tool, major) for build in builds]
    return head + switch + "".join(parts) + _TAIL


def _build(build: Build, tool: str, major: int) -> str:
    job, name = build.job, build.name
    lines = [f"\n# {name}"]
    if odd := [n for n in job.ranges if not _is_plain(n, "") or n.startswith("-")]:
        lines.append(_left_out("polygraphy", odd))
    else:
        lines.append(_polygraphy(job, name))
    if odd := [n for n in job.ranges if not _is_plain(n, ",'*")]:
        return "\n".join([*lines, _left_out(tool, odd)]) + "\n"
    if "STRIP_PLAN" in job.flags:
        lines.append(f"# With its weights, because {tool} runs no engine without.")
    lines.append(_tool_build(job, name, tool))
    for index, shapes in enumerate(build.timed):
        lines.append(_tool_run(job, f"{name}.{index}", name, shapes, tool, major))
    return "\n".join(lines) + "\n"


def _polygraphy(job: Job, name: str) -> str:
    workspace = [] if job.workspace_gib is None else [f"workspace:{int(job.workspace_gib * GIB)}"]
    level = [] if job.builder_level is None else [str(job.builder_level)]
    targets = [f"{number[:-1]}.{number[-1]}" for number in _numbers(job)]
    words = [
        *("polygraphy", "convert", job.onnx, "--convert-to", "trt", "--strongly-typed"),
        *(["--tf32"] if job.library == "tensorrt" else []),
        *_flags(job, _POLYGRAPHY_FLAGS),
        *_option("--compute-capabilities", targets),
        *_option("--pool-limit", workspace),
        *_option("--builder-optimization-level", level),
        *(["--hardware-compatibility-level", "ampere_plus"] if _anywhere(job) else []),
    ]
    for bound, position in _BOUNDS:
        shapes = {name: shape[position] for name, shape in job.ranges.items()}
        # Names are patterns there.
        words += [
            f"--trt-{bound}-shapes",
            *(f"{glob.escape(n)}:[{','.join(map(str, s))}]" for n, s in shapes.items()),
        ]
    return f'run {name}.polygraphy {shlex.join(words)} -vv --output "$out/{name}.plan"'


def _tool_build(job: Job, name: str, tool: str) -> str:
    words = [tool, f"--onnx={job.onnx}", "--skipInference"]
    if tool == "trtexec":
        words += [
            "--stronglyTyped", "--profilingVerbosity=detailed", "--verbose",
            *_flags(job, _TRTEXEC_FLAGS),
        ]  # fmt: skip
        if job.workspace_gib is not None:
            words.append(f"--memPoolSize=workspace:{int(job.workspace_gib * GIB)}B")
        if job.builder_level is not None:
            words.append(f"--builderOptimizationLevel={job.builder_level}")
        if _anywhere(job):
            words.append("--hardwareCompatibilityLevel=ampere+")
    else:
        # No more of its options are documented; that of sparse weights changes no engine there.
        words.append(f"--computeCapabilities={','.join(_numbers(job))}")
    for bound, position in _BOUNDS:
        shapes = {name: shape[position] for name, shape in job.ranges.items()}
        words.append(f"--{bound}Shapes={_spec(shapes)}")
    layers = f' --exportLayerInfo="$out/{name}.layers.json"' if tool == "trtexec" else ""
    return f'run {name}.{tool} {shlex.join(words)} --saveEngine="$out/{name}.{tool}.plan"{layers}'


def _tool_run(job: Job, run: str, name: str, shapes: Shapes, tool: str, major: int) -> str:
    words = [f"--shapes={_spec(shapes)}"]
    if tool == "tensorrt_rtx":
        words.append("--rtxCudaGraphStrategy=disable")
    else:
        # Of copies and CUDA graphs, trtexec of TensorRT 10 times the first and 11 the second.
        words.append("--noCudaGraph" if major >= 11 else "--noDataTransfers")
        words += _flags(job, {"VERSION_COMPATIBLE": "--versionCompatible"})
    return f'run {run}.{tool} {tool} --loadEngine="$out/{name}.{tool}.plan" {shlex.join(words)}'


_BOUNDS = (("min", 0), ("opt", 1), ("max", 2))
_POLYGRAPHY_FLAGS = {
    "SPARSE_WEIGHTS": "--sparse-weights", "VERSION_COMPATIBLE": "--version-compatible",
    "STRIP_PLAN": "--strip-plan", "REFIT": "--refittable",
}  # fmt: skip
_TRTEXEC_FLAGS = {
    "SPARSE_WEIGHTS": "--sparsity=enable", "VERSION_COMPATIBLE": "--versionCompatible",
    "REFIT": "--refit",
}  # fmt: skip


def _flags(job: Job, options: Mapping[str, str]) -> list[str]:
    return [options[flag] for flag in job.flags if flag in options]


def _option(name: str, values: Sequence[str]) -> list[str]:
    return [name, *values] if values else []


def _anywhere(job: Job) -> bool:
    return job.compatibility == "ampere+"


def _numbers(job: Job) -> list[str]:
    return [name.removeprefix("SM") for name in job.capabilities]


def _spec(shapes: Shapes) -> str:
    """Shapes as trtexec reads them; quotes keep a colon in a name."""
    quoted = ((f"'{n}'" if ":" in n else n, shape) for n, shape in shapes.items())
    return ",".join(f"{n}:{'x'.join(map(str, shape)) or 'scalar'}" for n, shape in quoted)


def _is_plain(name: str, special: str) -> bool:
    """Whether a tool can be told this name, which `special` characters would end."""
    return name.isprintable() and bool(name) and not any(c in name for c in special)


def _left_out(tool: str, names: Iterable[str]) -> str:
    return f"# Not by {tool}, which cannot be told the names {_line(', '.join(map(ascii, names)))}."


def _line(text: str) -> str:
    """Text that ends no comment."""
    return " ".join(text.split())
