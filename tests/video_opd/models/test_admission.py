"""Which prompts enter an engine before its next pass."""

from typing import Any

from tests.engines import encoded
from tests.fakes import make_prompt
from video_opd.models.admission import Admission, Beginning, beginning_of


def of_clip(name: str) -> Beginning:
    """10 tokens that all prompts of the clip begin with, and 2 others."""
    return beginning_of(encoded(make_prompt("p", clip_id=name)))


def test_prompts_begin_alike_up_to_the_end_of_their_video_if_it_is_the_same():
    first, second, other = (
        encoded(make_prompt(n, clip_id=c)) for n, c in (("p", "a"), ("q", "a"), ("p", "b"))
    )
    second.token_ids[-1] = 99
    assert beginning_of(first) == beginning_of(second) != beginning_of(other)
    second.token_ids[0] = 99  # as with the question before the video
    assert beginning_of(first) != beginning_of(second)


def test_a_new_clip_enters_when_the_next_pass_computes_all_of_it():
    a, b, c = map(of_clip, "abc")
    admission: Any = Admission(32)
    admission.begin_pass(0, 0)
    assert admission.fits(a)
    admission.enter(a, 4)  # the answers share the clip: 10 + 4 * 2 tokens
    assert admission.fits(b)
    admission.enter(a, 2)
    assert not admission.fits(b) and admission.fits(a), "others of a clip follow it"
    admission.begin_pass(0, 6)
    admission.enter(a, 1)
    assert admission.fits(b), "12 tokens of 26: the end of its video may be computed again with other words"
    admission.enter(b, 1)
    assert not admission.fits(c)
    admission.begin_pass(18, 3)
    assert not admission.fits(c) and admission.fits(b), "of the pass before"
    for of in (a, a, a):
        admission.leave(of)
    assert not admission.fits(a) and list(admission._inside) == [b[:2]]


def test_a_prompt_larger_than_a_pass_enters_an_engine_that_computes_no_other():
    admission = Admission(8)
    admission.begin_pass(1, 5)
    assert not admission.fits(of_clip("a"))
    admission.begin_pass(0, 8)
    assert admission.fits(of_clip("a"))
