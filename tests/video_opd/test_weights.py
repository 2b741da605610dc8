"""Weights arrive as they were sent: cut into buckets and put together again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from video_opd.errors import WeightsLostError
from video_opd.weights import buckets
from video_opd.weights.buckets import check_whole, to_buckets, unpack

DTYPES = (torch.float32, torch.bfloat16)
layers = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 7), min_size=0, max_size=3)),
    min_size=1,
    max_size=12,
)


def tensors(specification, seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    """Random bit patterns, so that infinities, NaNs with payloads and denormals are among them."""
    rng = np.random.default_rng(seed)
    named = []
    for number, (dtype, shape) in enumerate(specification):
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        bits = torch.from_numpy(rng.integers(0, 256, count, dtype=np.uint8))
        named.append((f"layer.{number}", bits.view(dtype).view(shape)))
    return named


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@given(specification=layers, bucket_bytes=st.integers(1, 400), seed=st.integers(0, 100))
def test_what_arrives_is_what_was_sent_bit_for_bit_and_in_order(specification, bucket_bytes, seed):
    sent = tensors(specification, seed)
    arrived = list(unpack(list(to_buckets(sent, 7, bucket_bytes))))
    assert [name for name, _ in arrived] == [name for name, _ in sent]
    for (name, a), (_, b) in zip(arrived, sent, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert bits(a) == bits(b), name


@given(specification=layers, bucket_bytes=st.integers(1, 400))
def test_a_bucket_of_several_tensors_keeps_the_bound_and_holds_one_dtype(specification, bucket_bytes):
    sent = dict(tensors(specification))
    for bucket in to_buckets(sent.items(), 7, bucket_bytes):
        assert {part.dtype for part in bucket.parts} == {np.dtype(np.uint8)} and bucket.policy_version == 7
        assert bucket.num_bytes <= bucket_bytes or len(bucket.names) == 1
        assert [part.nbytes for part in bucket.parts] == [sent[name].nbytes for name in bucket.names]
        assert {str(sent[name].dtype) for name in bucket.names} == {f"torch.{bucket.dtype}"}
        assert bucket.shapes == tuple(tuple(sent[name].shape) for name in bucket.names)


def test_a_version_that_is_not_whole_is_told_from_one_that_is():
    buckets = list(to_buckets([(str(i), torch.full((25,), float(i))) for i in range(9)], 3, 400))
    check_whole(buckets, 3)
    broken = {
        "tensor 8 came where tensor 4 was due": [buckets[0], buckets[2]],
        "tensor 0 came where tensor 4 was due": [buckets[0], buckets[0]],
        "tensor 4 came where tensor 0 was due": buckets[1:],
        "tensor 0 came where tensor 9 was due": [*buckets, *buckets],
        "ended after 8 tensors, before its last bucket": buckets[:2],
        "ended after 0 tensors": [],
    }
    for problem, those in broken.items():
        with pytest.raises(WeightsLostError, match=problem):
            check_whole(those, 3)
    with pytest.raises(WeightsLostError, match="version 4: a bucket of version 3 came"):
        check_whole(buckets, 4)


def test_buckets_are_filled_before_the_next_is_begun():
    sent = [(str(i), torch.full((25,), float(i))) for i in range(9)]  # 100 bytes each
    assert [len(b.names) for b in to_buckets(sent, 0, 400)] == [4, 4, 1]
    assert [len(b.names) for b in to_buckets(sent, 0, 399)] == [3, 3, 3]


def test_a_tensor_larger_than_the_bound_travels_alone():
    sent = [("small", torch.ones(2)), ("large", torch.arange(1000.0)), ("last", torch.zeros(2))]
    buckets = list(to_buckets(sent, 0, 64))
    assert [b.names for b in buckets] == [("small",), ("large",), ("last",)]
    assert dict(unpack(buckets))["large"].tolist() == list(range(1000))


def test_a_tensor_that_is_not_contiguous_and_one_that_is_a_parameter_arrive_whole():
    matrix = torch.arange(12.0).view(3, 4)
    sent = [("transposed", matrix.T), ("parameter", torch.nn.Parameter(matrix + 1))]
    arrived = dict(unpack(list(to_buckets(sent, 0, 1 << 20))))
    assert torch.equal(arrived["transposed"], matrix.T) and torch.equal(arrived["parameter"], matrix + 1)


def test_on_the_way_to_the_store_and_out_of_it_nothing_is_copied():
    """Ray copies once, from the tensors themselves, and hands out read-only arrays over shared memory."""
    weight = torch.arange(4.0)
    (bucket,) = to_buckets([("weight", weight)], 0, 1 << 20)
    bucket.parts[0].flags.writeable = False
    arrived = dict(unpack([bucket]))["weight"]
    weight[0] = 7.0
    assert arrived.tolist() == [7.0, 1.0, 2.0, 3.0]


def test_off_a_gpu_a_bucket_is_copied_into_one_pinned_buffer_with_one_wait(monkeypatch):
    """A GPU's part is played by the CPU: `meta` says that the tensors are elsewhere."""
    made, waits, empty = [], [], torch.empty

    def pinned(size: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(size)
        return empty(size, dtype=dtype)

    class Elsewhere:
        """A tensor's bytes on a GPU."""

        def __init__(self, here: torch.Tensor):
            self.here, self.device = here, torch.device("meta")

        def __len__(self) -> int:
            return len(self.here)

        @classmethod
        def __torch_function__(cls, function, types, arguments, options):
            assert function is torch.Tensor.copy_ and options == {"non_blocking": True}
            return arguments[0].copy_(arguments[1].here)

    sent = [(str(i), torch.randn(25)) for i in range(9)]
    own = buckets._bytes_of
    monkeypatch.setattr(buckets, "_bytes_of", lambda tensor: Elsewhere(own(tensor)))
    monkeypatch.setattr("torch.empty", pinned)
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: waits.append(len(made)))
    arrived = dict(unpack(list(to_buckets(sent, 0, 400))))
    assert made == [400, 400, 100] and waits == [1, 2, 3]
    assert all(torch.equal(arrived[name], tensor) for name, tensor in sent)
