"""A broadcast group with real gloo: what is sent arrives, and nobody waits for those who are gone."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from actors.weight_receiver import split
from learner.weight_sender import tensor_buckets, to_flat
from video_opd.broadcast import BroadcastGroup, Rendezvous
from video_opd.errors import WeightsLostError

HOST = "127.0.0.1"
TIMEOUT_S = 60.0
PATIENCE_S = 20.0  # far below TIMEOUT_S: who waits longer waited for a timeout
BUCKET_BYTES = 1 << 20


def weights(version: int, count: int = 12) -> list[tuple[str, torch.Tensor]]:
    """Two dtypes, one tensor larger than a bucket, one without elements."""
    torch.manual_seed(version)
    named = [
        (f"layer.{i}", torch.randn(300, 500).to(torch.bfloat16 if i % 3 == 0 else torch.float32))
        for i in range(count)
    ]
    return [*named, ("large", torch.randn(1000, 500)), ("empty", torch.empty(0, 3))]


def send(group: BroadcastGroup, version: int) -> None:
    group.meet()
    for header, tensors in tensor_buckets(weights(version), version, BUCKET_BYTES):
        group.send(header, to_flat(tensors))


def receive(group: BroadcastGroup, version: int) -> list[tuple[str, torch.Tensor]]:
    group.meet()
    return list(split(group.receive_version(version)))


@pytest.fixture
def threads():
    pool = ThreadPoolExecutor(8)
    yield pool
    pool.shutdown(wait=False, cancel_futures=True)


def failure(future: Future) -> str:
    with pytest.raises(WeightsLostError) as caught:
        future.result(PATIENCE_S)
    return str(caught.value)


@pytest.mark.parametrize("num_receivers", [1, 2, 4])
def test_every_receiver_gets_every_version_bit_for_bit(threads, num_receivers):
    rendezvous = Rendezvous(HOST, 1 + num_receivers, "gloo")

    def member(rank: int):
        group = BroadcastGroup(rendezvous.place(rank), TIMEOUT_S)
        results = [(send if rank == 0 else receive)(group, version) for version in (5, 6)]
        group.close()
        return results

    members = [threads.submit(member, rank) for rank in range(1 + num_receivers)]
    for future in members[1:]:
        for version, arrived in zip((5, 6), future.result(PATIENCE_S), strict=True):
            assert [(n, t.dtype) for n, t in arrived] == [(n, t.dtype) for n, t in weights(version)]
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(arrived, weights(version), strict=True))


def test_members_that_wait_for_one_that_never_comes_hear_that_the_group_is_abandoned(threads):
    rendezvous = Rendezvous(HOST, 3, "gloo")
    here = [
        threads.submit(lambda rank=rank: BroadcastGroup(rendezvous.place(rank), TIMEOUT_S).meet())
        for rank in (0, 1)
    ]
    time.sleep(0.3)
    assert not any(future.done() for future in here)
    rendezvous.abandon()
    for rank, future in enumerate(here):
        assert f"rank {rank} of 3: another member, or the driver, gave it up" in failure(future)


def test_members_do_not_wait_longer_than_the_timeout(threads):
    rendezvous = Rendezvous(HOST, 2, "gloo")
    group = BroadcastGroup(rendezvous.place(0), 0.5)
    assert "no answer within 0 s" in failure(threads.submit(group.meet)).replace("1 s", "0 s")


def test_a_receiver_refuses_another_version(threads):
    rendezvous = Rendezvous(HOST, 2, "gloo")
    groups = [BroadcastGroup(rendezvous.place(rank), TIMEOUT_S) for rank in (0, 1)]
    threads.submit(send, groups[0], 4)
    assert "a bucket of version 4 came as one of version 5" in failure(threads.submit(receive, groups[1], 5))
    rendezvous.abandon()


def test_without_the_drivers_store_a_member_is_told_so():
    rendezvous = Rendezvous(HOST, 2, "gloo")
    place = rendezvous.place(0)
    del rendezvous
    with pytest.raises(WeightsLostError, match="rank 0 of 2"):
        BroadcastGroup(place, 1.0)


def _stop_after_one_bucket(place, number: int) -> None:
    """A receiver in a process of its own that dies, or hangs, by a signal to itself in the middle of a version."""
    group = BroadcastGroup(place, TIMEOUT_S)
    group.meet()
    group.receive()
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_when_one_dies_or_hangs_in_the_middle_the_others_end_and_another_group_works(threads, number):
    """The driver abandons the group when it sees a death; gloo alone would leave some to its timeout."""
    rendezvous = Rendezvous(HOST, 4, "gloo")
    victim = multiprocessing.get_context("spawn").Process(
        target=_stop_after_one_bucket, args=(rendezvous.place(1), number)
    )
    victim.start()
    groups = {rank: BroadcastGroup(rendezvous.place(rank), TIMEOUT_S) for rank in (0, 2, 3)}

    def endless(group: BroadcastGroup) -> None:
        group.meet()
        for version in range(10**6):
            for header, tensors in tensor_buckets(weights(0), version, BUCKET_BYTES):
                group.send(header, to_flat(tensors))

    def drain(group: BroadcastGroup) -> None:
        group.meet()
        while True:
            group.receive()

    try:
        members = [threads.submit(endless if rank == 0 else drain, group) for rank, group in groups.items()]
        deadline = time.monotonic() + TIMEOUT_S
        while not any(future.done() for future in members) and (
            number == signal.SIGKILL or not _is_stopped(victim)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rendezvous.abandon()
        for future in members:
            assert "the weights' broadcast" in failure(future)
        for group in groups.values():
            group.close()  # what is under way does not hold it up
        rendezvous = Rendezvous(HOST, 2, "gloo")
        again = [BroadcastGroup(rendezvous.place(rank), TIMEOUT_S) for rank in (0, 1)]
        threads.submit(send, again[0], 7)
        assert len(threads.submit(receive, again[1], 7).result(PATIENCE_S)) == len(weights(7))
    finally:
        victim.kill()
        victim.join(PATIENCE_S)


def _is_stopped(process) -> bool:
    with open(f"/proc/{process.pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


def _die_while_connecting(place) -> None:
    group = BroadcastGroup(place, TIMEOUT_S)
    group._connect = lambda connected: os.kill(os.getpid(), signal.SIGKILL)
    group.meet()


def test_one_that_dies_while_all_connect_holds_nobody_up(threads):
    """gloo goes on trying to reach it until its timeout."""
    rendezvous = Rendezvous(HOST, 3, "gloo")
    victim = multiprocessing.get_context("spawn").Process(
        target=_die_while_connecting, args=(rendezvous.place(1),)
    )
    victim.start()
    members = [
        threads.submit(lambda rank=rank: BroadcastGroup(rendezvous.place(rank), TIMEOUT_S).meet())
        for rank in (0, 2)
    ]
    victim.join(TIMEOUT_S)
    time.sleep(0.5)
    rendezvous.abandon()
    for future in members:
        assert "gave it up" in failure(future)
