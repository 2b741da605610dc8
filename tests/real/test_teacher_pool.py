"""The teacher pool under load: scaled from another process, robbed of replicas, measured.

The replicas are real and their engine sleeps; one test has tiny models. The tests share one pool in turn.
"""

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.exceptions import ObjectLostError

import preflight.nodes
from benchmarks import emulated_teacher
from benchmarks.emulated_teacher import EmulatedReplica, make_groups
from driver.idle_gpus import FEWEST_PROMPTS, more_replicas
from preflight.gpus import read_machine
from teacher_service.engine import TransformersEngine, Wanted
from teacher_service.following import Weights
from teacher_service.pool import TeacherPool
from teacher_service.scaling import Bounds, PoolStatus, delete_orphans, ongoing_calls, read_pool, read_pools
from teacher_service.teachers import Teachers
from tests.preflight.test_memory_fit import config_of, plan_of
from tests.real.conftest import DEMO, reference_logprobs, scored_groups
from video_opd import ROOT
from video_opd.config_file import load_config
from video_opd.config_teachers import TeacherModel
from video_opd.models.forward import load_model
from video_opd.types import TrajectoryGroup
from video_opd.weights.buckets import to_buckets

RUN, CALL_S, CALLERS, PATIENCE_S = "pool-test", 0.1, 6, 600.0
MOST_ONGOING = 2  # of a replica: deployment_options, with max_batch_requests=1
EMULATED = [
    "teacher_pool.max_batch_requests=1",
    "teacher_pool.batch_wait_s=0",
    "teacher_pool.num_cpus=0.1",
    "teacher_pool.health_check_s=1",
    "teacher_pool.upscale_delay_s=0",
    "teacher_pool.target_ongoing_requests=1",
    "request_timeout_s=90",
    "start_timeout_s=600",
    f"worker_env.{emulated_teacher.CALL_S}='{CALL_S}'",
]


@pytest.fixture(scope="module")
def pool(local_ray):
    """A pool of one replica whose engine sleeps."""
    config = load_config(DEMO, EMULATED)
    pool = TeacherPool(f"video_opd/{RUN}", config, config.teacher_models[0], EmulatedReplica)
    asyncio.run(pool.start())
    yield pool
    reports = pool._handle._router._asyncio_router._metrics_manager.metrics_pusher._async_tasks
    assert reports, "a thread of Serve reports what is queued"
    pool.stop()
    assert not reports, "it would go on after ray.shutdown"


@pytest.fixture
def command(local_ray) -> Callable[..., Awaitable[tuple[int, str, str]]]:
    """`python -m teacher_service` as from another terminal: (exit code, stdout, stderr)."""
    address = ray.get_runtime_context().gcs_address

    async def run(*arguments: str, address: str = address) -> tuple[int, str, str]:
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith("RAY_")
        }  # as another terminal has
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "teacher_service", *arguments, "--address", address),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, error = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        return process.returncode or 0, out.decode(), error.decode()

    return run


@dataclass
class Load:
    """Callers that each make one call after the other, every call's content its own, until told to stop."""

    pool: TeacherPool
    answered: Counter[int] = field(default_factory=Counter)
    stopped: bool = False
    next_call: int = 0

    async def _caller(self) -> None:
        while not self.stopped:
            call, self.next_call = self.next_call, self.next_call + 1
            groups = make_groups(
                call, num_groups=2, rollouts=2, prompt_tokens=20_000, response_tokens=4
            )  # too large to be inlined
            results = await self.pool.score(ray.put(groups))
            self.answered[call] += 1
            for group, scores in zip(groups, results, strict=True):
                assert isinstance(scores, tuple)
                assert [s.trajectory_id for s in scores] == [t.trajectory_id for t in group.trajectories]
                for score, trajectory in zip(scores, group.trajectories, strict=True):
                    assert (score.teacher_logprobs == -trajectory.response_token_ids).all()

    async def during(self, work: Coroutine[Any, Any, None]) -> None:
        """Keeps calling while `work` goes on; then every call made is answered once."""

        async def stop() -> None:
            try:
                await work
            finally:
                self.stopped = True

        await asyncio.wait_for(
            asyncio.gather(stop(), *(self._caller() for _ in range(CALLERS))), 2 * PATIENCE_S
        )
        assert self.answered == Counter(range(self.next_call))
        assert self.next_call > CALLERS


async def until(pool: TeacherPool, condition: Callable[[PoolStatus], bool]) -> PoolStatus:
    """Serve's word that the condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition(status := await asyncio.to_thread(read_pool, pool.app)):
            await asyncio.sleep(0.2)
    return status


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.2)


def test_scaling_from_another_terminal_disturbs_no_call_and_restarts_no_replica(pool, command):
    async def scale() -> None:
        (pid,) = read_pool(pool.app).pids
        code, out, error = await command("scale", "4")
        assert (code, error) == (0, ""), error
        assert "4 wanted, 4 running, 0 starting" in out
        grown = read_pool(pool.app)
        assert len(set(grown.pids)) == 4 and pid in grown.pids
        await asyncio.sleep(2 * CALL_S)
        await pool.counts()  # asks Serve
        metrics = await pool.take_metrics()
        assert (
            metrics["teacher/replicas"],
            metrics["teacher/replicas_wanted"],
            metrics["teacher/retries"],
        ) == (4, 4, 0)
        assert 0 < metrics["teacher/utilisation"] < 1.5 and metrics["teacher/queue_s"] > 0
        code, out, error = await command("scale", "1")
        assert (code, error) == (0, ""), error
        assert read_pool(pool.app).pids == (pid,)
        assert psutil.Process(pid).is_running()

    asyncio.run(Load(pool).during(scale()))


def test_further_replicas_help_until_a_pass_is_over_and_then_have_ended(pool):
    run: Any = SimpleNamespace(teacher=pool, config=pool._config, idle_replicas=2)

    async def go() -> tuple[PoolStatus, PoolStatus]:
        async with more_replicas(run, FEWEST_PROMPTS):
            during = await until(pool, lambda status: status.running == 3)
        return during, read_pool(pool.app)

    during, after = asyncio.run(go())
    assert after.reached and after.running == 1 and set(after.pids) < set(during.pids)
    assert all(not psutil.pid_exists(pid) for pid in set(during.pids) - set(after.pids))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_calls_of_a_replica_that_dies_or_hangs_are_made_again(pool, how):
    async def take_one() -> None:
        (pid,) = (await until(pool, lambda p: p.reached)).pids
        await pool.take_metrics()
        await asyncio.sleep(3 * CALL_S)
        # what a replica has not taken, Serve sends elsewhere by itself, and it may have none for a moment
        await until(pool, lambda p: ongoing_calls(p) == MOST_ONGOING)
        os.kill(pid, how)
        after = await until(pool, lambda p: p.running == 1 and pid not in p.pids)
        assert after.wanted == 1
        await until_gone(pid)  # it gives back what it holds: only now do calls to one that hung come back
        async with asyncio.timeout(PATIENCE_S):
            while not (await pool.take_metrics())["teacher/retries"]:
                await asyncio.sleep(CALL_S)

    asyncio.run(Load(pool).during(take_one()))


def test_calls_that_queue_start_replicas_within_bounds_that_change_live(pool, command):
    async def autoscale() -> None:
        (pid,) = (await until(pool, lambda p: p.reached)).pids
        code, out, error = await command("scale", "--min", "1", "--max", "3")
        assert (code, error) == (0, ""), error
        assert "autoscaling 1 to 3" in out
        assert pid in (await until(pool, lambda p: p.running == 3)).pids
        code, out, error = await command("scale", "--min", "1", "--max", "2")
        assert (code, error) == (0, ""), error
        narrowed = await until(pool, lambda p: p.reached)
        assert (narrowed.bounds, narrowed.running) == (Bounds(1, 2), 2)
        assert pid in narrowed.pids

    asyncio.run(Load(pool).during(autoscale()))


def test_status_finds_a_ray_that_launch_started(pool, command):
    from ray._private.services import find_gcs_addresses

    alone = len(find_gcs_addresses()) == 1  # else it asks which of them is meant
    code, out, error = asyncio.run(command("status", **({"address": "auto"} if alone else {})))
    assert (code, error) == (0, ""), error
    assert f"run {RUN}, teacher teacher: replicas 2 wanted, 2 running" in out
    assert all(str(pid) in out for pid in read_pool(pool.app).pids)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scale", "65"], "hold 64 of the resource `teacher` and it has no autoscaler"),
        (["scale", "2", "--run", "nowhere"], f"run nowhere is not on this Ray; running: {RUN}"),
    ],
)
def test_bad_input_is_one_line(pool, command, arguments, said):
    code, out, error = asyncio.run(command(*arguments))
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


async def gone(reference: ray.ObjectRef) -> None:
    """Waits for the object's loss: the owner's process may outlive the call that kills it."""
    while True:
        try:
            await reference
        except ObjectLostError:
            return
        await asyncio.sleep(0.1)


def test_an_argument_that_is_gone_is_the_callers_matter(pool):
    @ray.remote(num_cpus=0.1)
    class Owner:
        def put(self) -> list[Any]:
            return [ray.put(make_groups(0, 1, 1, 100_000, 4))]

    async def score_what_died() -> None:
        owner: Any = Owner.remote()
        (reference,) = await owner.put.remote()
        ray.kill(owner)
        await asyncio.wait_for(gone(reference), PATIENCE_S)
        await pool.take_metrics()
        with pytest.raises(ObjectLostError):
            await asyncio.wait_for(pool.score(reference), PATIENCE_S)
        assert (await pool.take_metrics())["teacher/retries"] == 0

    asyncio.run(score_what_died())


def test_two_tiny_teachers_say_what_their_engines_say(local_ray, config, prompts, encoder):
    """One of them scores half of the prompts alone; of the others the log-probs are the weighted mean."""
    first, last = prompts[0].prompt_id, prompts[3].prompt_id
    assert first != last and config.teacher
    teachers = [
        TeacherModel(name="large", model=config.teacher, weight=3.0),
        TeacherModel(name="small", model=config.student, prompts=f"^{re.escape(last)}$"),
    ]
    config = config.model_copy(update={"teacher": None, "teachers": tuple(teachers)})
    groups = [g.group for g in scored_groups([prompts[0], prompts[3]], encoder, seed=0, rollouts=2)]
    pairs = [(encoder.encode(g.prompt), t.response_token_ids) for g in groups for t in g.trajectories]
    engines = (TransformersEngine(t.model, config.teacher_pool, Wanted(), 0, encoder) for t in teachers)
    large, small = ([s.logprobs for s in engine.score(*zip(*pairs, strict=True))] for engine in engines)
    expected = [*large[:2], *(0.75 * a + 0.25 * b for a, b in zip(large[2:], small[2:], strict=True))]

    async def score() -> None:
        pool = Teachers("video_opd/tiny", config)
        await pool.start()
        try:
            results = await pool.score(ray.put(groups))
            metrics = await pool.take_metrics()
        finally:
            pool.stop()
        scores = [s for of_group in results if isinstance(of_group, tuple) for s in of_group]
        assert [s.teacher_id for s in scores] == ["large", "large", "large+small", "large+small"]
        for score, exact in zip(scores, expected, strict=True):
            assert np.abs(score.teacher_logprobs - exact).max() < 1e-4
        assert metrics["teacher/large/replicas"] == metrics["teacher/small/replicas"] == 1
        assert all(math.isfinite(value) and value >= 0 for value in metrics.values())

    asyncio.run(score())


def test_a_teacher_that_follows_scores_with_the_students_version_of_then_also_from_a_new_replica(
    local_ray, config, prompts, encoder
):
    """Version n of the student has its first weights, moved n times; trajectories are of version 3."""
    own = TeacherModel(name="self", model=config.student, follows="student", delay=2)
    parts = {"teacher": None, "teachers": (own,), "max_retries": 3}
    parts["teacher_pool"] = config.teacher_pool.model_copy(update={"health_check_s": 1})
    config = config.model_copy(update=parts)
    made = [g.group for g in scored_groups(prompts[:2], encoder, seed=0)]
    groups = [replace(g, trajectories=(replace(g.trajectories[0], policy_version=3),)) for g in made]
    pairs = [(encoder.encode(g.prompt), g.trajectories[0].response_token_ids) for g in groups]
    model, exact, published = load_model(config.student, "float32").eval(), [], []
    for version in range(5):
        picked = [reference_logprobs(model, p, r)[np.arange(len(r)), r] for p, r in pairs]
        exact.append(np.concatenate(picked))
        buckets = to_buckets(model.named_parameters(), version, 1 << 20)
        published.append(Weights(version, tuple(map(ray.put, buckets))))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)

    async def scored(teachers: Teachers, groups: Sequence[TrajectoryGroup]) -> np.ndarray:
        results = await teachers.score(groups)
        return np.concatenate([s.teacher_logprobs for of in results if isinstance(of, tuple) for s in of])

    async def score() -> list[np.ndarray]:
        teachers = Teachers("video_opd/following", config)
        await teachers.start()
        (pool,) = teachers.pools.values()
        try:
            for weights in published[:4]:
                teachers.take_published(weights)
            found = [await scored(teachers, groups)]
            assert (await teachers.take_metrics())["teacher/self/version"] == 1
            (pid,) = read_pool(pool.app).pids
            os.kill(pid, signal.SIGKILL)
            await until(pool, lambda p: p.running == 1 and pid not in p.pids)
            found.append(await scored(teachers, groups))
            teachers.take_published(published[4])
            rows = [(replace(g.trajectories[0], policy_version=4),) for g in groups]
            found.append(
                await scored(
                    teachers, [replace(g, trajectories=t) for g, t in zip(groups, rows, strict=True)]
                )
            )
            assert (await teachers.take_metrics())["teacher/self/version"] == 2
        finally:
            pool.stop()
        return found

    first, replaced, later = asyncio.run(score())
    for found, version in ((first, 1), (replaced, 1), (later, 2)):
        assert np.abs(found - exact[version]).max() < 1e-4
    assert min(np.abs(a - b).max() for a, b in pairwise(exact)) > 1e-2


def test_what_a_killed_driver_left_is_deleted_and_nothing_else(pool):
    assert delete_orphans([RUN]) == [] and [p.run for p in read_pools()] == [RUN]
    assert delete_orphans(["another"]) == [pool.app]
    deadline = time.monotonic() + PATIENCE_S
    while read_pools():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_each_node_with_gpus_says_which_ones(local_ray, monkeypatch):
    """This machine has none, so Ray is made to say that it has."""
    nodes = [node | {"Resources": node["Resources"] | {"GPU": 1.0}} for node in local_ray.nodes()]
    asked = []
    monkeypatch.setattr(preflight.nodes.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(
        preflight.nodes, "check_node", lambda name, machine, *_: asked.append((name, machine))
    )
    preflight.nodes.check_gpus(plan_of(config_of("qwen3vl_8b.yaml")))
    assert asked == [(nodes[0]["NodeManagerHostname"], read_machine())]
