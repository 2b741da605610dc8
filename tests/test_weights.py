"""Weights arrive as they were sent: cut into buckets and put together again."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.weight_receiver import unpack
from learner.weight_sender import to_buckets

DTYPES = (torch.float32, torch.bfloat16)
layers = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 7), min_size=0, max_size=3)), min_size=1, max_size=12)


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
        assert bucket.buffer.dtype == np.uint8 and bucket.policy_version == 7
        assert bucket.buffer.nbytes <= bucket_bytes or len(bucket.names) == 1
        assert bucket.buffer.nbytes == sum(sent[name].nbytes for name in bucket.names)
        assert {str(sent[name].dtype) for name in bucket.names} == {f"torch.{bucket.dtype}"}
        assert bucket.shapes == tuple(tuple(sent[name].shape) for name in bucket.names)


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


def test_read_only_buffers_can_be_unpacked_and_the_result_owns_its_memory():
    """Ray hands out read-only arrays over shared memory."""
    (bucket,) = to_buckets([("weight", torch.arange(4.0))], 0, 1 << 20)
    bucket.buffer.flags.writeable = False
    arrived = dict(unpack([bucket]))["weight"]
    arrived += 1
    assert dict(unpack([bucket]))["weight"].tolist() == [0.0, 1.0, 2.0, 3.0]
