"""A broadcast group of its own: one process sends tensors to several, beside whatever process groups each of them has.

What is kept true:

- The group is torch's ProcessGroupGloo or ProcessGroupNCCL itself, never registered: DeepSpeed's and vLLM's default groups,
  which each own their process, do not see it.
- Nobody waits inside the backend. Operations are polled, connecting happens in a thread, and between polls a member looks at
  the driver's store whether the group is abandoned: when one member dies, the others hear of it from the driver rather than
  from a timeout.
- Every wait ends after `timeout_s` at the latest, with WeightsLostError; after one the group is of no more use.
- A receiver takes buckets in their order, of one version, up to the last; anything else is a WeightsLostError.
"""

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from video_opd.errors import WeightsLostError
from video_opd.types import BucketHeader, GroupPlace

T = TypeVar("T")

ABANDON_S = 30.0
"""By then a member of an abandoned group has answered, the rest of a learner's parameters gathered; or it hangs."""

_ABANDONED = "abandoned"
_SHORTEST_POLL_S, _LONGEST_POLL_S, _LOOK_S = 5e-5, 5e-2, 0.2


def node_store(host: str, port: int, size: int | None, is_master: bool) -> TCPStore:
    """torch's store at `host`, where processes meet; its master listens on that address alone, where torch's own takes all.

    `port` 0: any. `size`: the master waits for so many; None: for nobody.
    """
    wait = {"world_size": size, "wait_for_workers": size is not None}
    if not is_master:
        return TCPStore(host, port, is_master=False, **wait)
    family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server((host, port), family=family)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, master_listen_fd=listener.detach(), **wait)


class Rendezvous:
    """The driver's side of a group: where its members meet, and learn that it is abandoned."""

    def __init__(self, host: str, size: int, backend: str):
        """`host`: this process's address, as the members see it. `size`: the sender included."""
        self._store = node_store(host, 0, None, is_master=True)
        self._host, self._size, self._backend = host, size, backend

    def place(self, rank: int) -> GroupPlace:
        backend: Any = self._backend
        return GroupPlace(host=self._host, port=self._store.port, rank=rank, size=self._size, backend=backend)

    def abandon(self) -> None:
        """Every member gives up what it waits for, within about a second."""
        self._store.set(_ABANDONED, "1")


class BroadcastGroup:
    """One member. Used by one thread; every member makes the same calls in the same order."""

    def __init__(self, place: GroupPlace, timeout_s: float):
        """Raises WeightsLostError when the driver's store does not answer."""
        self._place, self._timeout_s = place, timeout_s
        self._num_meetings = 0
        self._group: Any = None
        self._device = torch.device("cuda" if place.backend == "nccl" else "cpu")
        self._store = self._ask(lambda: _open_store(place, timeout_s))

    @property
    def device(self) -> torch.device:
        """Where the tensors that travel are."""
        return self._device

    def meet(self) -> None:
        """Returns when every member has called it. Before each transmission: what each does before may take long."""
        key = f"met/{self._num_meetings}"
        self._num_meetings += 1
        self._ask(lambda: self._store.add(key, 1))
        self._until(lambda: self._ask(lambda: self._store.add(key, 0)) >= self._place.size)
        if self._group is None:
            connected: Future[Any] = Future()
            threading.Thread(target=self._connect, args=[connected], daemon=True).start()
            self._until(connected.done)
            self._group = self._ask(connected.result)

    def send(self, header: BucketHeader, flat: torch.Tensor) -> None:
        """uint8[bytes of all tensors], on the group's device. Returns when the memory may be used again."""
        text = torch.frombuffer(bytearray(json.dumps(dataclasses.asdict(header)).encode()), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(text), len(flat)], device=self._device))
        self._broadcast(text.to(self._device))
        self._broadcast(flat)

    def receive(self) -> tuple[BucketHeader, torch.Tensor]:
        """The next bucket: uint8[bytes of all tensors], in memory of its own on the group's device."""
        sizes = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._broadcast(sizes)
        text, flat = (torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes.tolist())
        self._broadcast(text)
        self._broadcast(flat)
        fields = json.loads(text.cpu().numpy().tobytes())
        fields |= {
            "names": tuple(fields["names"]),
            "shapes": tuple(tuple(shape) for shape in fields["shapes"]),
        }
        return BucketHeader(**fields), flat

    def receive_version(self, policy_version: int) -> Iterator[tuple[BucketHeader, torch.Tensor]]:
        """Every bucket of one version, as they come."""
        return in_order(iter(self.receive, None), policy_version)

    def close(self) -> None:
        """Leaves without waiting for an operation under way: the backend's own end does, in a thread of its own."""
        if self._group is not None:
            if self._place.backend == "nccl":
                self._group.abort()
            last = [self._group]
            self._group = None
            threading.Thread(target=last.clear, daemon=True).start()

    def __del__(
        self,
    ) -> None:  # else the backend's end would hold up whichever thread drops the last reference
        self.close()

    def _connect(self, connected: Future[Any]) -> None:
        """All that blocks: backends try to reach a dead member until their timeout, NCCL also in the first operation."""
        try:
            group = _process_group(self._place, self._timeout_s)
            _start_broadcast(group, torch.zeros(1, device=self._device)).wait()
            connected.set_result(group)
        except RuntimeError as error:
            connected.set_exception(error)

    def _broadcast(self, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        work = self._ask(lambda: _start_broadcast(self._group, tensor))
        self._until(work.is_completed)
        self._ask(work.wait)

    def _until(self, is_true: Callable[[], bool]) -> None:
        """Polls, seldom when it takes long."""
        started = looked = time.monotonic()
        pause = _SHORTEST_POLL_S
        while not is_true():
            now = time.monotonic()
            if now - looked > _LOOK_S:
                looked = now
                if self._ask(lambda: self._store.check([_ABANDONED])):
                    raise self._lost("another member, or the driver, gave it up")
            if now - started > self._timeout_s:
                raise self._lost(f"no answer within {self._timeout_s:.0f} s")
            time.sleep(pause)
            pause = min(_LONGEST_POLL_S, max(pause, (now - started) / 20))

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:  # torch's DistError and gloo's errors are such
            raise self._lost(error) from error

    def _lost(self, why: object) -> WeightsLostError:
        return WeightsLostError(
            f"the weights' broadcast, at rank {self._place.rank} of {self._place.size}: {why}"
        )


def in_order(
    buckets: Iterable[tuple[BucketHeader, T]], policy_version: int
) -> Iterator[tuple[BucketHeader, T]]:
    """The same buckets. Raises WeightsLostError unless they are one version's, each after the one before, to the last."""
    expected = 0
    for header, content in buckets:
        if header.policy_version != policy_version:
            raise WeightsLostError(
                f"a bucket of version {header.policy_version} came as one of version {policy_version}"
            )
        if header.first != expected:
            raise WeightsLostError(
                f"version {policy_version}: tensor {header.first} came where tensor {expected} was due"
            )
        expected += len(header.names)
        yield header, content
        if header.is_last:
            return
    raise WeightsLostError(f"version {policy_version} ended after {expected} tensors, before its last bucket")


def _start_broadcast(group: Any, tensor: torch.Tensor) -> dist.Work:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


def _open_store(place: GroupPlace, timeout_s: float) -> TCPStore:
    return TCPStore(
        place.host, place.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def _process_group(place: GroupPlace, timeout_s: float) -> Any:
    timeout = timedelta(seconds=timeout_s)
    store = _open_store(place, timeout_s)  # of its own: a client that waits for a key answers nothing else
    if place.backend == "gloo":
        return dist.ProcessGroupGloo(PrefixStore("gloo", store), place.rank, place.size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(PrefixStore("nccl", store), place.rank, place.size, options)
