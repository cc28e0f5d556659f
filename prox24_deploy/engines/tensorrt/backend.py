"""TensorRT 10 and 11, and TensorRT-RTX: one way to build, inspect and open their engines.

Precision lives in the ONNX file and networks are strongly typed. The sparse twin is built with
SPARSE_WEIGHTS, the dense one without; a sparse kernel is taken where it timed faster, so what was
taken is read from the log and from the finished engine.

TensorRT builds on the GPU that it builds for; that was not exercised, for no machine that tests
this has it. TensorRT-RTX also builds ahead of time for GPUs that are not here. Such a build proves
that a model parses and compiles; its kernels are chosen on the GPU, so whether they are sparse is
unknown.
"""

import importlib.metadata
import json
import logging
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.core.atomic import make_folder, writing
from prox24_deploy.core.backends import BackendKind
from prox24_deploy.core.child import run_child
from prox24_deploy.core.errors import BackendMissingError, EngineError, UsageError
from prox24_deploy.core.host import gpu
from prox24_deploy.core.records import Engine, EngineEvidence, OnnxModel, TensorCheck
from prox24_deploy.core.types import QuantizedFormat, Twin
from prox24_deploy.engines.base import Origin, Session
from prox24_deploy.engines.tensorrt.evidence import engine_evidence, parse_builder
from prox24_deploy.engines.tensorrt.job import Job
from prox24_deploy.engines.tensorrt.library import TITLES, Library, load_library
from prox24_deploy.engines.tensorrt.record import read_build_record, write_build_record
from prox24_deploy.engines.tensorrt.reproduce import Build, reproduction
from prox24_deploy.engines.tensorrt.shapes import profile_of, timed_shapes

logger = logging.getLogger(__name__)

PLAN_FILE = "engine.plan"
LOG_FILE = "build.log"
LAYERS_FILE = "layers.json"
DEFAULT_CAPABILITIES = ("SM86", "SM89", "SM120")
# Compute capability from which GPUs multiply FP8.
_LEAST_FP8 = 89

_JOB_MODULE = "prox24_deploy.engines.tensorrt.job"
_REFUSAL = "polygraphy.exception.exception.PolygraphyException: "


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRt:
    """One of the two libraries, in the version that is installed, and what to build with it.

    `polygraphy` is the version of what drives it. `card` is the GPU of this machine with its
    compute capability and driver, empty without one.
    """

    library: Library
    version: str
    polygraphy: str
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
            self._write_record(work / PLAN_FILE, model, job)
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
            versions={self.library: self.version, "polygraphy": self.polygraphy},
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

    def reproduction(self, bundle: Path, engines: Sequence[Engine], script: str) -> str:
        """A shell script of the same builds and timings by NVIDIA's own tools."""
        builds = []
        for engine in engines:
            model = bundle / engine.onnx
            job = self._job(model, bundle, engine.twin)
            name = engine.twin if engine.graph == "model" else f"{engine.twin}.{engine.graph}"
            timed = timed_shapes(model, self.options)
            builds.append(Build(name=name, job=replace(job, onnx=engine.onnx), timed=timed))
        return reproduction(
            builds,
            script=script,
            version=self.version,
            polygraphy=self.polygraphy,
            device=self.device(),
        )

    def quantize_obstacle(self, format: QuantizedFormat) -> str:
        """Which GPU among those that are built for has no kernels for a format; "" for none."""
        built_for = self._capabilities() or self.card[1:2]
        lacking = [name for name in built_for if format == "fp8" and int(name[2:]) < _LEAST_FP8]
        if not lacking:
            return ""
        able = [name for name in DEFAULT_CAPABILITIES if int(name[2:]) >= _LEAST_FP8]
        remedy = f"--compute-capability {' or '.join(able)}" if self._capabilities() else "int8"
        return f"{lacking[0]} has no FP8 kernels, pass {remedy}"

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

    def _write_record(self, plan: Path, model: OnnxModel, job: Job) -> None:
        made = {"backend": self.name, "version": self.version, "device": self.device()}
        write_build_record(plan, made, model, job)

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
    return TensorRt(
        library=library,
        version=str(trt.__version__),
        polygraphy=importlib.metadata.version("polygraphy"),
        card=card,
        options=options,
    )


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
