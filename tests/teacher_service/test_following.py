"""A teacher that follows the student: what is refused, and which version scores which trajectories."""

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from driver import scoring
from teacher_service.calls import Reply
from teacher_service.following import PublishedVersions, Weights
from teacher_service.pool import Usage
from tests.fakes import make_group
from tests.teacher_service.test_replica import Parts, all_of, busy, check, group, replica_of
from tests.teacher_service.test_teachers import ALONE, COOKS, teachers_of
from video_opd.config import Config
from video_opd.config_file import parse_config
from video_opd.errors import ConfigError, LearnerLostError, WeightsLostError

SELF = {"name": "self", "model": ALONE["student"], "crop_margin_frac": 0.5, "follows": "student", "delay": 2}
UNIFORM: dict[str, Any] = {"curriculum": {"kind": "uniform"}, "groups_per_step": 2}


def config_with(teacher: dict[str, Any], *others: dict[str, Any], **more: Any) -> Config:
    return parse_config(ALONE | UNIFORM | {"teachers": [SELF | teacher, *others]} | more, "test")


def weights(version: int, bucket: Any = "bucket") -> Any:
    return Weights(version, (bucket,))


@pytest.mark.parametrize(
    ("teacher", "more", "said"),
    [
        ({"delay": 0}, {}, "with follows=student needs delay: set 1 or more"),
        ({"follows": "none"}, {}, "delay=2 does nothing without follows=student"),
        ({"follows": "teacher"}, {}, "follows"),
        ({"delay": -1}, {}, "delay"),
        ({"model": "m"}, {}, "needs the student's own model, .*, not m"),
        ({}, {"loss": {"kind": "opd_full"}}, "is for loss.kind=opd and opd_topk, not opd_full"),
        ({}, {"loss": {"kind": "off_policy_rkd"}}, "not off_policy_rkd"),
        ({}, {"teacher_pool": {"engine": "vllm"}}, "needs teacher_pool.engine=transformers"),
        ({}, {"learner": {"lora_rank": 8}}, "set learner.lora_publish=merged"),
        ({}, {"learner": {"weight_transfer": "collective"}}, "set learner.weight_transfer=object_store"),
        ({}, {"curriculum": {"kind": "tvdf"}}, "changes the answers and scores of the curriculum"),
    ],
)
def test_what_a_teacher_that_follows_cannot_have_is_refused(teacher, more, said):
    with pytest.raises(ConfigError, match=said):
        config_with(teacher, **more)


def test_weights_go_through_the_object_store_to_a_transformers_engine_whatever_the_gpus():
    following = config_with({})
    assert (following.weight_transfer, following.teacher_engine) == ("object_store", "transformers")
    fixed = config_with({"follows": "none", "delay": 0})
    assert (fixed.weight_transfer, fixed.teacher_engine) == ("collective", "vllm")


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("first", [0, 5])
def test_trajectories_of_a_version_are_scored_by_the_one_delay_versions_before(first, delay, lag):
    versions = PublishedVersions(delay, lag)
    for newest in range(first, first + 9):
        versions.add(weights(newest))
        for version in range(max(first, newest - lag), newest + 1):
            assert versions.behind(version) == weights(max(first, version - delay))
        assert len(versions._kept) <= delay + lag + 1
    versions.add(back := weights(first + 3, "other"))  # of a learner that was restarted there
    assert versions.behind(first + 3) is back
    versions.add(weights(first + 4))
    assert versions.behind(first + 4) is back
    assert list(versions._kept) == [first + 3, first + 4]


def test_each_version_has_a_call_of_its_own_and_other_teachers_get_all_in_one():
    teachers, (own, cooks) = teachers_of(config_with({}, COOKS, max_policy_lag=2))
    for version in range(4):
        teachers.take_published(weights(version))
    groups = []
    for name, version in (("a", 3), ("b", 2), ("c", 3), ("d", 1)):
        made = make_group(name).group
        rows = tuple(replace(t, policy_version=version) for t in made.trajectories)
        groups.append(replace(made, trajectories=rows))
    results = asyncio.run(teachers.score(groups))
    assert own.weights == [weights(1), weights(0)] and own.asked == ["a", "c", "b", "d"]
    assert cooks.weights == [None] and cooks.asked == ["a", "b", "c", "d"]
    ids = [[s.trajectory_id for s in of_group] for of_group in results if isinstance(of_group, tuple)]
    assert ids == [[t.trajectory_id for t in g.trajectories] for g in groups]


def test_calls_for_different_weights_are_not_merged_and_those_are_loaded_in_their_order():
    parts, loaded = Parts(), list[str]()
    replica: Any = replica_of(parts, max_batch_requests=4, micro_batch=8, batch_wait_s=0)
    replica._load_weights = lambda weights: loaded.append(weights.policy_version)
    groups = [group(name) for name in "abcd"]

    async def calls() -> list[Reply]:
        with busy(replica):
            asked = [
                asyncio.ensure_future(replica.score([g], weights=weights(v)))
                for g, v in zip(groups, (1, 1, 2, 1), strict=True)
            ]
            while len(replica._waiting) < 4:
                await asyncio.sleep(0.01)
        return await all_of(*asked)

    replies = asyncio.run(calls())
    assert parts.passes == [["a", "b"], ["c"], ["d"]] and loaded == [1, 2, 1]
    assert [r.policy_version for r in replies] == [1, 1, 2, 1]
    for reply, asked in zip(replies, groups, strict=True):
        check(reply, [asked])


def test_the_version_is_a_metric_of_teachers_that_follow_alone():
    usage = Usage(0.0, 1)
    usage.add(1.0, Reply([], 0.5, 1))
    assert "version" not in usage.take_metrics(1.0, 1, 1)
    usage.add(1.0, Reply([], 0.5, 1, policy_version=7))
    assert usage.take_metrics(2.0, 1, 1)["version"] == 7


def test_weights_that_went_with_the_learner_are_its_loss():
    async def lost(*_: Any) -> None:
        raise WeightsLostError("weights of version 3 are gone")

    async def score() -> None:
        run: Any = SimpleNamespace(teacher=SimpleNamespace(score=lost), clock=lambda _: nullcontext())
        await scoring.ask_teacher(run, [], [])

    with pytest.raises(LearnerLostError, match="weights of version 3 are gone"):
        asyncio.run(score())
