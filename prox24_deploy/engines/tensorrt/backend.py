"""TensorRT 10 and 11, and TensorRT-RTX: one way to build, inspect and open their engines.

Precision lives in the ONNX file and networks are strongly typed. The sparse twin is built with
SPARSE_WEIGHTS, the dense one without; a sparse kernel is taken where it timed faster, so what was
taken is read from the log and from the finished engine.

TensorRT builds on the GPU that it builds for; that was not exercised, for no machine that tests
this has it. TensorRT-RTX also builds ahead of time for GPUs that are not here. Such a build proves
that a model parses and compiles; its kernels are chosen on the GPU, so whether they are sparse is
unknown.
"""

import json
import logging
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.config.recipe import TensorSpec, shape_of
from prox24_deploy.core.atomic import make_folder, write_atomic, writing
from prox24_deploy.core.backends import BackendKind
from prox24_deploy.core.documents import Document, read_json
from prox24_deploy.core.errors import BackendMissingError, EngineError, UsageError
from prox24_deploy.core.host import gpu
from prox24_deploy.core.records import Engine, EngineEvidence, OnnxModel, TensorCheck
from prox24_deploy.core.types import Twin
from prox24_deploy.engines.base import Origin, Session
from prox24_deploy.engines.child import run_child
from prox24_deploy.engines.tensorrt.evidence import engine_evidence, parse_builder
from prox24_deploy.engines.tensorrt.job import Job, ShapeRange
from prox24_deploy.engines.tensorrt.library import TITLES, Library, load_library

logger = logging.getLogger(__name__)

PLAN_FILE = "engine.plan"
RECORD_FILE = "engine.json"
LOG_FILE = "build.log"
LAYERS_FILE = "layers.json"
DEFAULT_CAPABILITIES = ("SM86", "SM89", "SM120")

_JOB_MODULE = "prox24_deploy.engines.tensorrt.job"
_AGAIN = "compile the model again"
_REFUSAL = "polygraphy.exception.exception.PolygraphyException: "


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """Flags that an engine was built with, and per input the least and the largest batch."""

    flags: list[str]
    batches: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRt:
    """One of the two libraries, in the version that is installed, and what to build with it.

    `card` is the GPU of this machine with its compute capability and driver, empty without one.
    """

    library: Library
    version: str
    card: tuple[str, ...]
    options: EngineOptions

    @property
    def name(self) -> str:
        """Name on the command line and folder under `engines/`."""
        return self.library.replace("_", "-")

    @property
    def sparse_kernels(self) -> bool:
        """True: TensorRT has sparse kernels, and TensorRT-RTX is held to the same limit."""
        return True

    @property
    def on_gpu(self) -> bool:
        """True."""
        return True

    def device(self) -> str:
        """The GPU that is built on, or those that are built for."""
        return ", ".join(self._capabilities()) or self.card[0]

    def build(self, bundle: Path, model: OnnxModel, out: Path, *, twin: Twin) -> Engine:
        """Compile into `engine.plan`, with the builder's log, its layers and a record beside it.

        The builder runs in a process of its own, because native code may crash and a failed build
        leaves state behind. A failed one leaves its log and nothing else.

        Raises:
            EngineError: the file does not compile; says what the builder said last.
        """
        if twin == "sparse" and model.dtype == "float32":
            logger.warning(
                "%s is float32, for which %s has no sparse kernels: this engine will run dense; "
                "export with --dtype float16.",
                model.path,
                TITLES[self.library],
            )
        target = bundle / out
        work = target.with_name(f".{target.name}.building")
        for leftover in (work, target):
            shutil.rmtree(leftover, ignore_errors=True)
        make_folder(work)
        try:
            job = self._job(bundle / model.path, work, twin)
            self._run(job, work / LOG_FILE, target / LOG_FILE)
            _write_record(work / RECORD_FILE, self, model, job)
            with writing(target):
                work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Engine(
            path=(out / PLAN_FILE).as_posix(),
            backend=self.name,
            twin=twin,
            onnx=model.path,
            onnx_sha256=model.sha256,
            device=self.device(),
            dtype=model.dtype,
            versions={self.library: self.version},
            size_bytes=(target / PLAN_FILE).stat().st_size,
            said=parse_builder(_text(target / LOG_FILE), _text(target / LAYERS_FILE)),
        )

    def evidence(
        self, _bundle: Path, engine: Engine, sparsity: tuple[TensorCheck, ...]
    ) -> EngineEvidence:
        """Say what the builder said, by layer of the model."""
        if self.library == "tensorrt_rtx":
            unknown = (
                f"{TITLES[self.library]} chooses kernels on the GPU and its builder names none"
            )
        else:
            unknown = f"the log of the builder does not say, see {LOG_FILE} beside {engine.path}"
        return engine_evidence(self.name, engine.device, engine.said, sparsity, unknown)

    @contextmanager
    def open(self, bundle: Path, engine: Engine) -> Iterator[Session]:
        """Load an engine on the GPU of this machine. Not exercised on a GPU.

        Raises:
            BackendMissingError: there is no GPU, or torch cannot use it.
            EngineError: the record is damaged or of another model, or the engine does not load.
        """
        title = TITLES[self.library]
        built_for = engine.device.split(", ")
        if not self.card or (self._capabilities() and self.card[1] not in built_for):
            raise BackendMissingError(
                f"{title} engines for {engine.device} cannot run here, this machine has "
                f"{' '.join(self.card[:2]) or 'no NVIDIA GPU'}; run prox24-deploy bench on the "
                "bundle on a machine that has such a GPU."
            )
        import torch

        if not torch.cuda.is_available():
            raise BackendMissingError(
                f"{title} engines need buffers on the GPU, which this CPU build of torch cannot "
                "make; install a CUDA build of torch."
            )
        from prox24_deploy.engines.tensorrt.session import opened

        plan = bundle / engine.path
        stripped = "STRIP_PLAN" in read_build_record(plan, engine).flags
        weights = bundle / engine.onnx if stripped else None
        with opened(self.library, plan, weights, engine.path) as session:
            yield session

    def _capabilities(self) -> tuple[str, ...]:
        """What TensorRT-RTX compiles for; TensorRT compiles for the GPU of this machine alone."""
        if self.library == "tensorrt":
            return ()
        return self.options.tensorrt.capabilities or DEFAULT_CAPABILITIES

    def _job(self, model: Path, work: Path, twin: Twin) -> Job:
        options = self.options.tensorrt
        flags = ["SPARSE_WEIGHTS"] if twin == "sparse" else []
        if options.compatibility == "version":
            flags.append("VERSION_COMPATIBLE")
        if options.strip_weights:
            flags.append("STRIP_PLAN")
        if options.refit:
            flags.append("REFIT")
        return Job(
            library=self.library,
            onnx=str(model),
            plan=str(work / PLAN_FILE),
            layers=str(work / LAYERS_FILE) if self._loads_here() else None,
            flags=flags,
            ranges=profile_of(model, self.options),
            capabilities=self._capabilities(),
            workspace_gib=options.workspace_gib,
            builder_level=options.builder_level,
            compatibility=options.compatibility,
            timing_cache=self._timing_cache(twin),
        )

    def _loads_here(self) -> bool:
        """Whether the GPU of this machine is one of those that are built for."""
        capabilities = self._capabilities()
        return bool(self.card) and (not capabilities or self.card[1] in capabilities)

    def _timing_cache(self, twin: str) -> str | None:
        """One file for whatever changes a timing, so that no dense choice is replayed as sparse."""
        folder = self.options.tensorrt.timing_cache
        if folder is None:
            return None
        key = "-".join((self.library, self.version, *(self.card or ("no-gpu",)), twin))
        return str(
            folder / f"{''.join(c if c.isalnum() or c in '.-_' else '_' for c in key)}.cache"
        )

    def _run(self, job: Job, log: Path, kept_log: Path) -> None:
        with writing(log):
            file = log.open("wb")
        with file:
            code = run_child(
                # Unbuffered, so that the last words before a crash are there.
                [sys.executable, "-u", "-m", _JOB_MODULE],
                json.dumps(asdict(job)).encode(),
                file,
            )
        if code == 0 and Path(job.plan).is_file():
            return
        make_folder(kept_log.parent)
        with writing(kept_log):
            log.replace(kept_log)
        raise EngineError(
            f"{TITLES[self.library]} does not compile {job.onnx} for {self.device()}: "
            f"{_last_words(_text(kept_log), code)}; the whole log is {kept_log}."
        )


def open_backend(kind: BackendKind, options: EngineOptions, _: Origin) -> TensorRt:
    """The one of the two libraries that a backend stands for; see `open_tensorrt`."""
    library = next(library for library in TITLES if library == kind.library)
    return open_tensorrt(library, options)


def open_tensorrt(library: Library, options: EngineOptions) -> TensorRt:
    """The backend of one library as it is installed here.

    Raises:
        BackendMissingError: the library is missing, or the GPU that TensorRT builds on.
        UsageError: TensorRT-RTX does not know a compute capability.
    """
    trt = load_library(library)
    found = gpu()
    card: tuple[str, ...] = ()
    if "compute capability" in found:
        capability = found["compute capability"].replace(".", "")
        card = (found["gpu"], f"SM{capability}", found["driver"])
    if library == "tensorrt" and not card:
        raise BackendMissingError(
            "Backend 'tensorrt' builds on the GPU that it builds for, and this machine has no "
            "NVIDIA GPU; run on one that has, or build ahead of time with --backend tensorrt-rtx."
        )
    if library == "tensorrt_rtx":
        known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
        for name in options.tensorrt.capabilities:
            if name not in known:
                raise UsageError(
                    f"TensorRT-RTX {trt.__version__} does not compile for {name}; pass "
                    f"--compute-capability as one of {', '.join(known)}."
                )
    return TensorRt(library=library, version=str(trt.__version__), card=card, options=options)


def profile_of(model: Path, options: EngineOptions) -> dict[str, ShapeRange]:
    """Least, usual and largest shape of every input, over all shapes asked for.

    Kernels are timed at the usual shape, which is the largest asked for. A graph with a cache also
    decodes: its sequences begin at 1 and its past at 0.
    """
    longest = max(options.sequences)
    inputs = [
        TensorSpec(
            name=value.name,
            dtype="float",
            axes=[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in onnx.load(model, load_external_data=False).graph.input
    ]
    cached = any("past" in spec.axes for spec in inputs)
    least = {
        "batch": min(options.batches),
        "sequence": 1 if cached else min(options.sequences),
        "past": 0,
        "source": min(options.sequences),
    }
    most = {"batch": max(options.batches), **dict.fromkeys(("sequence", "past", "source"), longest)}
    return {
        spec.name: (shape_of(spec, least), shape_of(spec, most), shape_of(spec, most))
        for spec in inputs
    }


def _last_words(log: str, code: int) -> str:
    """The reason that a log gives last: an error of the library, else whatever was said."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.partition("[E]")[2].strip() for line in lines if "[E]" in line]
    last = (errors or lines or ["it said nothing"])[-1]
    if code < 0:
        return f"it was ended by a signal ({signal.strsignal(-code)}), its last message was: {last}"
    return last.removeprefix(_REFUSAL).rstrip(".")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _write_record(path: Path, backend: TensorRt, model: OnnxModel, job: Job) -> None:
    record = {
        "backend": backend.name,
        "version": backend.version,
        "device": backend.device(),
        "onnx": model.path,
        "onnx_sha256": model.sha256,
        "flags": job.flags,
        "profile": job.ranges,
        "compatibility": job.compatibility,
        "workspace_gib": job.workspace_gib,
        "builder_level": job.builder_level,
    }
    write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())


def read_build_record(plan: Path, engine: Engine) -> BuildRecord:
    """How an engine was built, from the record beside it.

    Raises:
        EngineError: the record is damaged or of another model.
    """
    path = plan.with_name(RECORD_FILE)
    try:
        record = read_json(path, Document(f"Engine record {path}", EngineError, _AGAIN))
        flags, sha256 = list(record["flags"]), record["onnx_sha256"]
        batches = {
            name: (int(least[0]), int(most[0]))
            for name, (least, _, most) in record.get("profile", {}).items()
            if least
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise EngineError(f"Engine record {path} cannot be read ({error}); {_AGAIN}.") from error
    if sha256 != engine.onnx_sha256:
        raise EngineError(
            f"Engine record {path} is of an ONNX file with hash {sha256}, expected "
            f"{engine.onnx_sha256}; {_AGAIN}."
        )
    return BuildRecord(flags, batches)
