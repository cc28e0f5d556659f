"""ONNX Runtime on CPU: the backend that needs no GPU, and the reference for numerics.

It has no sparse kernels, so dense and 2:4 models take the same time; it proves what an exported
model computes, never that sparsity pays.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.backends import BackendKind
from prox24_deploy.core.documents import Document, read_json
from prox24_deploy.core.errors import BackendMissingError, EngineError
from prox24_deploy.core.host import cpu_model
from prox24_deploy.core.records import Engine, EngineEvidence, LayerEvidence, OnnxModel, TensorCheck
from prox24_deploy.core.types import Twin
from prox24_deploy.engines.base import Array, Feeds, Origin

logger = logging.getLogger(__name__)

# What ONNX Runtime says where there is no memory left.
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation")
PROVIDER = "CPUExecutionProvider"
ENGINE_FILE = "engine.json"
NO_SPARSE_KERNELS = "ONNX Runtime's CPU provider has no sparse kernels"

_SEVERITY_ERROR = 3


class OrtSession:
    """An ONNX Runtime session whose feeds are checked by name."""

    def __init__(self, session: ort.InferenceSession, source: str) -> None:
        self._session: ort.InferenceSession | None = session
        self._source = source
        self._inputs = {entry.name for entry in session.get_inputs()}
        self._outputs = [entry.name for entry in session.get_outputs()]

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; inputs and outputs by graph name.

        Raises:
            EngineError: an input is missing, unknown, or of a wrong type or shape.
        """
        self._check(feeds)
        return dict(zip(self._outputs, self._run(dict(feeds)), strict=True))

    def latencies_ms(self, feeds: Feeds, *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
        """Wall time of each of `runs` runs after `warmup` untimed ones; shape (runs,), ms.

        Raises:
            EngineError: an input is missing, unknown, or of a wrong type or shape.
        """
        self._check(feeds)
        inputs = dict(feeds)
        for _ in range(warmup):
            self._run(inputs)
        elapsed = np.empty(runs, dtype=np.float64)
        for index in range(runs):
            start = time.perf_counter_ns()
            self._run(inputs)
            elapsed[index] = time.perf_counter_ns() - start
        return elapsed / 1e6

    def close(self) -> None:
        """Release the memory of the model; running afterwards is an error."""
        self._session = None

    def _check(self, feeds: Feeds) -> None:
        missing = sorted(self._inputs - feeds.keys())
        extra = sorted(feeds.keys() - self._inputs)
        if missing or extra:
            raise EngineError(
                f"Inputs do not fit {self._source}: missing {_listed(missing)}, not known "
                f"{_listed(extra)}; feed exactly {_listed(sorted(self._inputs))}."
            )

    def _run(self, inputs: dict[str, Array]) -> list[Any]:
        if self._session is None:
            raise EngineError(f"The session of {self._source} is closed; open the engine again.")
        try:
            return list(self._session.run(self._outputs, inputs))
        except Exception as error:  # its exceptions share no base class below Exception
            _require_memory(error)
            raise EngineError(
                f"ONNX Runtime could not run {self._source}: {_one_line(error)}; check the types "
                "and shapes of the inputs."
            ) from error


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """The CPU provider of ONNX Runtime; `threads` None leaves the number to ONNX Runtime."""

    threads: int | None = None

    @property
    def name(self) -> str:
        """Name on the command line and folder under `engines/`."""
        return "onnxruntime"

    @property
    def sparse_kernels(self) -> bool:
        """False: 2:4 weights run on dense kernels here."""
        return False

    @property
    def on_gpu(self) -> bool:
        """False: the CPU provider."""
        return False

    def device(self) -> str:
        """The processor by name."""
        return f"CPU ({cpu_model()})"

    def build(self, bundle: Path, model: OnnxModel, out: Path, *, twin: Twin) -> Engine:
        """Prove that the file loads and write `engine.json`, which says how to open it.

        Nothing is compiled ahead: the ONNX file itself is the engine, so `size_bytes` is its size.
        One in bfloat16 is not loaded, since the provider has no kernels for it, nor can it be
        opened here.

        Raises:
            EngineError: the file does not load, or the provider is missing.
        """
        options = {"intra_op_num_threads": self.threads or 0}
        if model.dtype != "bfloat16":
            _load(bundle / model.path, options)
        versions = {"onnxruntime": str(ort.__version__)}
        target = out / ENGINE_FILE
        _write_json(
            bundle / target,
            {
                "backend": self.name,
                "provider": PROVIDER,
                "onnx": model.path,
                "onnx_sha256": model.sha256,
                "session_options": options,
                "versions": versions,
            },
        )
        logger.info("%s is for ONNX Runtime %s", model.path, versions["onnxruntime"])
        return Engine(
            path=target.as_posix(),
            backend=self.name,
            twin=twin,
            onnx=model.path,
            onnx_sha256=model.sha256,
            device=self.device(),
            dtype=model.dtype,
            versions=versions,
            size_bytes=model.size_bytes,
        )

    def evidence(
        self, _bundle: Path, engine: Engine, sparsity: tuple[TensorCheck, ...]
    ) -> EngineEvidence:
        """Say of every weight declared 2:4 that it runs on a dense kernel."""
        layers = tuple(
            LayerEvidence(
                module=check.module or check.tensor,
                eligible=False,
                chosen=False,
                reason=NO_SPARSE_KERNELS,
            )
            for check in sparsity
            if check.expected
        )
        return EngineEvidence(
            backend=self.name,
            device=engine.device,
            eligible=0,
            chosen=0,
            summary=f"{NO_SPARSE_KERNELS}: 0 of {len(layers)} 2:4 layers run on one",
            layers=layers,
        )

    @contextmanager
    def open(self, bundle: Path, engine: Engine) -> Iterator[OrtSession]:
        """Load the ONNX file as `engine.json` says.

        Raises:
            EngineError: `engine.json` is damaged, is of another model, or the file does not load.
            BackendMissingError: the model is bfloat16.
        """
        if engine.dtype == "bfloat16":
            raise BackendMissingError(
                f"ONNX Runtime cannot run {engine.onnx} here, because its CPU provider has no "
                "bfloat16 kernels; build with --dtype float16 or float32 to measure it on a CPU, "
                "or for another backend with --backend."
            )
        options = _session_options(bundle / engine.path, engine)
        session = OrtSession(_load(bundle / engine.onnx, options), engine.onnx)
        try:
            yield session
        finally:
            session.close()


def _load(path: Path, options: dict[str, int]) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options["intra_op_num_threads"]
    settings.log_severity_level = _SEVERITY_ERROR
    # Dense and sparse are timed in turns: the idle one must not keep its threads spinning.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    # Else products of quantised models become products of integers, which saturate on some
    # processors (`graph.parity.bisect.session_options`); this backend is there for its numbers.
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = ort.InferenceSession(path, settings, providers=[PROVIDER])
    except Exception as error:  # its exceptions share no base class below Exception
        _require_memory(error)
        raise EngineError(
            f"ONNX Runtime {ort.__version__} does not load {path}: {_one_line(error)}; export the "
            "model again, or check that its external data lies beside it."
        ) from error
    if session.get_providers() != [PROVIDER]:
        raise EngineError(
            f"ONNX Runtime opened {path} with {_listed(session.get_providers())} where {PROVIDER} "
            "was asked for; install the plain onnxruntime package."
        )
    return session


def _session_options(path: Path, engine: Engine) -> dict[str, int]:
    document = Document(f"Engine file {path}", EngineError, "compile the model again")
    record = read_json(path, document)
    try:
        threads = int(record["session_options"]["intra_op_num_threads"])
        sha256 = record["onnx_sha256"]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise document.refused(f"cannot be read ({_one_line(error)})") from error
    if sha256 != engine.onnx_sha256:
        raise EngineError(
            f"Engine file {path} was made from an ONNX file with hash {sha256}, expected "
            f"{engine.onnx_sha256}; compile the model again."
        )
    return {"intra_op_num_threads": threads}


def _write_json(path: Path, record: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())


def _require_memory(error: Exception) -> None:
    """Raise where memory did not suffice: that says nothing about an engine, and may pass."""
    said = str(error)
    if any(words in said for words in _NO_MEMORY):
        raise MemoryError(_one_line(error)) from error


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def open_backend(_: BackendKind, _options: EngineOptions, _origin: Origin) -> OnnxRuntime:
    """The backend as it runs everywhere, in shapes of any size."""
    return OnnxRuntime()
