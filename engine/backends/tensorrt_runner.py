"""Loading and running TensorRT plans: one stream, shared scratch memory, a CUDA graph per hot batch.

Only calls that TensorRT 10.13 and later and 11.x have in common are used.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections import deque
from typing import Any

from geoengine.engine.backends.cuda import Cuda, GpuInfo
from geoengine.engine.backends.plans import Machine
from geoengine.engine.errors import BackendError

_KEPT_ERRORS = 50
_SHOWN_ERRORS = 3

_log = logging.getLogger(__name__)


class Runner:
    """Loads plans that run on one stream, one at a time, and share scratch memory for that reason."""

    def __init__(self, cuda: Cuda, stream: int, scratch_bytes: int) -> None:
        self.cuda, self.stream = cuda, stream
        self.trt = load_tensorrt()
        self.logger = collecting_logger(self.trt)
        self.scratch_bytes = max(scratch_bytes, 256)
        self.scratch = cuda.allocate(self.scratch_bytes, "intermediate results")
        try:
            self._runtime = self.trt.Runtime(self.logger)
        except TypeError as error:  # what the bindings raise when TensorRT gives nothing back
            raise BackendError(f"TensorRT does not start: {self.logger.last()}") from error

    def load(self, data: bytes, what: str, remedy: str) -> LoadedPlan:
        """Return a plan ready to run; raises BackendError when TensorRT refuses it.

        `what` names it in errors, `remedy` says how to make another.
        """
        self.logger.errors.clear()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(
                f"TensorRT {self.trt.__version__} refuses {what} ({self.logger.last()}): it was built by "
                f"another TensorRT or for another GPU, or there is too little GPU memory; {remedy}"
            )
        if engine.device_memory_size_v2 > self.scratch_bytes:
            raise BackendError(f"{what} needs more memory than it said when it was built; {remedy}")
        return LoadedPlan(self, engine, what)


class LoadedPlan:
    """One plan with one input and one output; not thread-safe.

    It has one context per profile, because a context that changes its profile waits, and one per CUDA graph:
    a graph is tied to the state of the context that it was captured from.
    """

    def __init__(self, runner: Runner, engine: Any, what: str) -> None:  # noqa: ANN401 - ICudaEngine
        self._runner, self._engine, self._what = runner, engine, what
        mode = runner.trt.TensorIOMode
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode.INPUT]
        outputs = [name for name in names if engine.get_tensor_mode(name) == mode.OUTPUT]
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendError(f"{what} has inputs {inputs} and outputs {outputs} instead of one each")
        [self._input], [self._output] = inputs, outputs
        if engine.get_tensor_dtype(self._output) != runner.trt.float32:
            raise BackendError(f"{what} gives {engine.get_tensor_dtype(self._output)} instead of float32")
        self._output_elements: int = math.prod(tuple(engine.get_tensor_shape(self._output))[1:])
        shapes = [
            [tuple(shape) for shape in engine.get_tensor_profile_shape(self._input, index)]
            for index in range(engine.num_optimization_profiles)
        ]
        self._input_tail = shapes[0][0][1:]
        self._batches = [(low[0], high[0]) for low, _, high in shapes]
        self._contexts = [self._context(profile) for profile in range(len(shapes))]
        self._graphs: dict[tuple[int, int, int], tuple[int, Any] | None] = {}

    def output_bytes(self, count: int) -> int:
        """Return the size of the output for a batch of `count`."""
        return 4 * count * self._output_elements

    def enqueue(self, count: int, source: int, target: int) -> None:
        """Enqueue a batch: its input lies at `source`, its output goes to `target`."""
        self._run(self._contexts[self._profile(count)], count, source, target)

    def replay(self, count: int, source: int, target: int) -> None:
        """Do what `enqueue` does as one CUDA graph; the first time for these arguments captures it."""
        key = (count, source, target)
        if key not in self._graphs:
            context = self._context(self._profile(count))
            self._run(context, count, source, target)  # settles what a capture could not record
            self._graphs[key] = self._capture(context, count, source, target)
            return
        captured = self._graphs[key]
        if captured is None:
            self.enqueue(count, source, target)
        else:
            self._runner.cuda.launch(captured[0], self._runner.stream)

    def _capture(self, context: Any, count: int, source: int, target: int) -> tuple[int, Any] | None:  # noqa: ANN401
        """Return the graph and the context it needs, or None when the plan cannot be captured."""
        cuda, stream = self._runner.cuda, self._runner.stream
        cuda.synchronize(stream)
        try:
            return cuda.capture(stream, lambda: self._run(context, count, source, target)), context
        except BackendError as error:
            _log.warning("%s runs batches of %d without a CUDA graph: %s", self._what, count, error)
            return None

    def _profile(self, count: int) -> int:
        for profile, (low, high) in enumerate(self._batches):
            if low <= count <= high:
                return profile
        raise ValueError(
            f"{self._what} takes batches of {self._batches[0][0]} to {self._batches[-1][1]}, got {count}"
        )

    def _context(self, profile: int) -> Any:  # noqa: ANN401 - IExecutionContext
        runner = self._runner
        strategy = runner.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, runner.stream):
            raise BackendError(f"TensorRT cannot prepare {self._what} to run: {runner.logger.last()}")
        context.set_device_memory(runner.scratch, runner.scratch_bytes)
        return context

    def _run(self, context: Any, count: int, source: int, target: int) -> None:  # noqa: ANN401
        done = (
            context.set_input_shape(self._input, (count, *self._input_tail))
            and context.set_tensor_address(self._input, source)
            and context.set_tensor_address(self._output, target)
            and context.execute_async_v3(stream_handle=self._runner.stream)
        )
        if not done:
            raise BackendError(
                f"TensorRT cannot run {self._what} with a batch of {count}: {self._runner.logger.last()}"
            )


def require_tensorrt() -> None:
    """Raise BackendError, with the command that installs it, when TensorRT's Python package is missing."""
    if importlib.util.find_spec("tensorrt") is None:
        raise BackendError("TensorRT is not installed: pip install 'geoengine[tensorrt]'")


def load_tensorrt() -> Any:  # noqa: ANN401 - the module, which has no types
    """Return the `tensorrt` module; raises BackendError when it, or a library of its, cannot be loaded."""
    require_tensorrt()
    try:
        import tensorrt
    except Exception as error:  # a missing or wrong library fails in many ways
        raise BackendError(
            f"TensorRT cannot be loaded ({error}): pip install --force-reinstall 'geoengine[tensorrt]'"
        ) from error
    return tensorrt


def this_machine(gpu: GpuInfo) -> Machine:
    """Return what plans of this machine are tied to."""
    return Machine(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
        tensorrt=load_tensorrt().__version__,
    )


@functools.cache
def collecting_logger(trt: Any) -> Any:  # noqa: ANN401 - TensorRT's classes exist only once it is loaded
    """Return a TensorRT logger that keeps the newest errors in `errors`; `last()` gives them as one line.

    It is one for the process and never goes away: TensorRT keeps using the first that it was given.
    """

    class Collecting(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_KEPT_ERRORS)

        def log(self, severity: Any, msg: str) -> None:  # noqa: ANN401 - the names are TensorRT's
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(" ".join(msg.split()))
            elif severity == trt.ILogger.WARNING:
                _log.debug("TensorRT: %s", msg.strip())

        def last(self) -> str:
            return "; ".join(list(self.errors)[-_SHOWN_ERRORS:]) or "it does not say why"

    return Collecting()
