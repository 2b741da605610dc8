"""Publications by broadcast, as the driver conducts them: learner rank 0 sends, the actors receive, nobody hangs."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from video_opd.broadcast import ABANDON_S, Rendezvous
from video_opd.cluster.deadline import waiting
from video_opd.config import Config
from video_opd.errors import DeadlineError, LearnerLostError, WeightsLostError
from video_opd.types import GroupPlace


class WeightSource(Protocol):
    """The learner, as far as publications go. Each call raises LearnerLostError when a rank is lost."""

    @property
    def generation(self) -> int:
        """Another number when its processes are others."""
        ...

    async def meet_actors(self, place: GroupPlace | None) -> None:
        """Returns when rank 0 and every actor are there. Raises WeightsLostError."""
        ...

    async def send_weights(self, policy_version: int) -> int:
        """Broadcasts to those it met; returns bytes. Raises WeightsLostError."""
        ...

    async def put_weights(self, policy_version: int) -> tuple[list[ray.ObjectRef], int]:
        """Publishes through the object store: buckets and bytes."""
        ...

    async def put_published_weights(self, policy_version: int) -> list[ray.ObjectRef]:
        """What was published last, in the object store. Raises WeightsLostError once the weights are to change."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one broadcast."""

    num_bytes: int
    lost: dict[
        str, Exception
    ]  # actor: why it has no whole version, or does not answer; the others have the version
    source_error: Exception | None


class WeightBroadcast:
    """Holds the group of rank 0 and the actors, for one publication after another.

    - The group is made anew when an actor or the learner is another than before, and after every failure.
    - The first failure of any member, and the deadline, abandon the group. Every member that has met the others then
      answers within ABANDON_S. An actor that does not is taken for lost after the deadline (DeadlineError); after another's
      failure it may have rollouts to end, and has no whole version (WeightsLostError). The learner: LearnerLostError.
    - An actor's calls are served in order: each ends the rollouts it already has, then meets the others.
    """

    def __init__(self, config: Config):
        self._timeout_s = config.request_timeout_s
        self._backend = "nccl" if config.learner.num_gpus and config.rollout.num_gpus else "gloo"
        self._members: tuple[int, list[str]] | None = None
        self._rendezvous: Rendezvous | None = None

    async def __call__(self, source: WeightSource, policy_version: int, actors: Mapping[str, Any]) -> Outcome:
        """Sends one version to `actors`, handles by name."""
        members = (source.generation, list(actors))
        is_new = members != self._members
        if is_new:
            self._rendezvous = Rendezvous(ray.util.get_node_ip_address(), 1 + len(actors), self._backend)
            self._members = members
        rendezvous = self._rendezvous
        assert rendezvous

        async def send() -> int:
            await source.meet_actors(rendezvous.place(0) if is_new else None)
            return await source.send_weights(policy_version)

        received = {
            name: asyncio.ensure_future(
                handle.receive_weights.remote(policy_version, rendezvous.place(rank) if is_new else None)
            )
            for rank, (name, handle) in enumerate(actors.items(), 1)
        }
        sent = asyncio.ensure_future(send())
        calls = [sent, *received.values()]
        try:
            with waiting(f"the broadcast of weights {policy_version}"):
                done, _ = await asyncio.wait(
                    calls, timeout=self._timeout_s, return_when=asyncio.FIRST_EXCEPTION
                )
                broke_off = not all(_succeeded(call) for call in done)
                if not all(_succeeded(call) for call in calls):
                    rendezvous.abandon()
                    await asyncio.wait(calls, timeout=ABANDON_S)
        finally:
            if not all(_succeeded(call) for call in calls):  # also when this is cancelled
                rendezvous.abandon()
                self._members = None
                for call in calls:
                    call.cancel()
        # one that is still busy with rollouts when another fails has not even begun
        silent = WeightsLostError if broke_off else DeadlineError
        errors = {name: _error(call, silent) for name, call in received.items()}
        return Outcome(
            num_bytes=sent.result() if _succeeded(sent) else 0,
            lost={name: error for name, error in errors.items() if error is not None},
            source_error=_error(sent, LearnerLostError),
        )


def _succeeded(call: asyncio.Future) -> bool:
    return call.done() and not call.cancelled() and call.exception() is None


def _error(call: asyncio.Future, if_silent: type[Exception]) -> Exception | None:
    """Why the call failed; None: it did not."""
    if not call.done() or call.cancelled():
        return if_silent(f"no answer within {ABANDON_S:.0f} s of the broadcast's end")
    error = call.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return error
