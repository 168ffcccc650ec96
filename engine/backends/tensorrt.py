"""The TensorRT backend: plans, CUDA graphs, and embeddings that stay on the GPU. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geoengine.engine.backends import TENSORRT, choose_variant
from geoengine.engine.backends.batches import Run
from geoengine.engine.backends.cuda import DeviceArray, gpu_info, mib
from geoengine.engine.backends.gpu import (
    GRAPH_BATCHES,
    PREFERRED_BATCH,
    GpuBackend,
    GpuFeed,
    graph_batch,
    staging_bytes,
)
from geoengine.engine.backends.plans import VARIANT, find_plans, read_plan, remedy, require_plans
from geoengine.engine.backends.tensorrt_runner import LoadedPlan, Runner, require_tensorrt, this_machine
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BackendError


class TensorRt(GpuBackend):
    """Runs a bundle's TensorRT plans on the first GPU, in fp16.

    A trunk's tokens stay on the GPU as the head's input. A plan is loaded when it is first needed; memory for
    the largest batch is taken once, when the backend is opened. `unchecked` also takes plans that have not
    passed the gates of a build; the gates do.
    """

    name, runs = TENSORRT, (VARIANT,)

    def __init__(
        self,
        bundle: EngineBundle,
        *,
        precision: str | None = None,
        threads: int | None = None,
        unchecked: bool = False,
    ) -> None:
        del threads  # the GPU does the work
        self.variant = choose_variant(bundle, self.name, precision, self.runs)
        require_tensorrt()
        require_plans(bundle)
        self._bundle, self._unchecked = bundle, unchecked
        super().__init__()

    @staticmethod
    def require() -> None:
        """Raise BackendError when it cannot run on this machine, whatever the bundle."""
        require_tensorrt()
        gpu_info()

    def _drop(self) -> None:
        self._loaded.clear()

    def _open(self) -> None:
        machine = this_machine(self._cuda.info)
        self._plans = find_plans(self._bundle, machine, unchecked=self._unchecked)
        self._check_memory()
        max_batch = self.max_batch = self._plans.config.max_batch
        self.batch = min(max_batch, PREFERRED_BATCH)
        self._feed = GpuFeed(self._cuda, self._bundle, self.variant, self._encode_into, max_batch=max_batch)
        self._runner = Runner(self._cuda, self._feed.stream, self._scratch_bytes())
        self._loaded: dict[str, LoadedPlan] = {}
        trunk = self._plan(self._graph(self._bundle.trunk_path(self._bundle.image_size, VARIANT)))
        self._tokens = self._cuda.allocate(trunk.output_bytes(max_batch), "tokens")
        self._graph_rows = min(max_batch, GRAPH_BATCHES[-1])
        self._row_bytes = 4 * self._bundle.embed_dim
        self._embeddings = self._cuda.allocate(self._graph_rows * self._row_bytes, "embeddings")

    def _check_memory(self) -> None:
        """Raise BackendError when it can be told at once that the GPU has too little memory."""
        graphs = self._bundle.manifest.graphs[VARIANT]
        used = {graphs.trunks[self._bundle.image_size], *graphs.heads.values()}
        weights = sum(self._plans.plans[graph].bytes for graph in used)
        staging = 2 * staging_bytes(self._bundle, VARIANT, self._plans.config.max_batch)
        needed, free = weights + staging + self._scratch_bytes(), self._cuda.free_bytes()
        if needed > free:
            raise BackendError(
                f"the TensorRT plans of {self._bundle.path} need {mib(needed)} of GPU memory, and "
                f"{self._cuda.info.name} has {mib(free)} free: close what else uses the GPU, or build with a "
                f"smaller --max-batch than {self._plans.config.max_batch}"
            )

    def _scratch_bytes(self) -> int:
        return max(plan.scratch_bytes for plan in self._plans.plans.values())

    def _encode_into(self, pixels: DeviceArray, runs: Sequence[Run], address: int) -> None:
        """Enqueue trunk and heads for one batch; see `EncodeInto`."""
        side, count = pixels.shape[1], pixels.shape[0]
        trunk = self._plan(self._graph(self._bundle.trunk_path(side, VARIANT)))
        heads = [self._plan(self._graph(self._bundle.head_path(run.encoder, VARIANT))) for run in runs]
        batch = graph_batch(count, min(pixels.room, self._graph_rows))
        if batch is None:
            trunk.enqueue(count, pixels.address, self._tokens)
        else:
            trunk.replay(batch, pixels.address, self._tokens)
            if len(runs) == 1:
                heads[0].replay(batch, self._tokens, self._embeddings)
                self._cuda.move(address, self._embeddings, count * self._row_bytes, self._feed.stream)
                return
        # A CUDA graph is tied to its addresses, and runs may begin anywhere.
        for run, head in zip(runs, heads, strict=True):
            tokens = self._tokens + trunk.output_bytes(run.start)
            head.enqueue(run.end - run.start, tokens, address + run.start * self._row_bytes)

    def _graph(self, path: Path | None) -> str:
        assert path is not None, "pictures come here only at sides that have a trunk"
        return path.relative_to(self._bundle.path).as_posix()

    def _plan(self, graph: str) -> LoadedPlan:
        if graph not in self._loaded:
            data = read_plan(self._bundle, self._plans, graph)
            file = self._plans.folder / self._plans.plans[graph].file
            self._loaded[graph] = self._runner.load(data, f"plan {file}", remedy(self._bundle))
        return self._loaded[graph]
