"""One process or several of `torchrun`, told apart in one place."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from geoengine.training.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Processes:
    """One process among those that train together; `device` is what it computes on.

    A step's tiles are dealt out to the processes; each computes the loss of all of them, which is a small
    matrix, and the gradient of its own embeddings. The sum over the processes is then the whole gradient, so
    the result is that of one process but for rounding.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Self:
        """Join the processes that torchrun started, or be the only one.

        `device` is "auto", "cpu", "cuda" or such; with several processes, each takes a GPU of its own.
        Raises TrainingError for a device that is not there.
        """
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if name == "cuda" and count > 1:
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            chosen = torch.device(name)
            torch.empty(1, device=chosen)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise TrainingError(
                f"device {device!r} cannot be used here ({str(error).splitlines()[0]}): "
                "name another one with --device, such as cpu"
            ) from None
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(rank, count, chosen)

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this process's part of `count` rows."""
        return self._shares(count)[self.rank]

    def gather(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """Return all processes' rows, float[count, d]; `own`, this one's share, stays part of the graph."""
        if self.count == 1:
            return own
        shares = self._shares(count)
        longest = max(share.stop - share.start for share in shares)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own.detach()
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        rows = [part[: share.stop - share.start] for part, share in zip(parts, shares, strict=True)]
        rows[self.rank] = own
        return torch.cat(rows)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up every parameter's gradient over the processes."""
        if self.count == 1:
            return
        grads = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all processes the first one's tensors."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            dist.barrier()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _shares(self, count: int) -> list[slice]:
        ends = [count * i // self.count for i in range(self.count + 1)]
        return [slice(*pair) for pair in pairwise(ends)]


def autocast(device: torch.device, precision: str) -> Any:  # noqa: ANN401 - torch's own type
    """Return the context in which matrix products run in `precision`, fp32 or bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def choose_precision(wanted: str, device: torch.device, width: int) -> str:
    """Return "fp32" or "bf16"; "auto" is bf16 where it is native, and faster.

    Half-sized numbers pay on CPUs with instructions for them, and there only for tokens that are longer than
    those of toy models (measured by `python -m geoengine.bench.training`). Raises TrainingError for another
    word.
    """
    if wanted not in ("auto", "fp32", "bf16"):
        raise TrainingError(f"precision must be auto, fp32 or bf16, got {wanted!r}")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and native and width >= _WIDE else "fp32"


_WIDE = 256
