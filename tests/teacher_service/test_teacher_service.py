"""The teacher service without Ray: usage, repeated calls, Serve's options, and the command line."""

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ApplicationStatus

import teacher_service.__main__ as command_line
import teacher_service.pool
from benchmarks.teacher_scaling import CALL_S, calls_within
from teacher_service.calls import Reply
from teacher_service.pool import TeacherPool, Usage, deployment_options
from teacher_service.replica import TeacherReplica
from teacher_service.scaling import Bounds, PoolStatus, app_name
from tests.fakes import make_prompt
from tests.video_opd.test_config import MINIMAL
from video_opd.cluster import command_line as shared_command_line
from video_opd.cluster import join
from video_opd.config import Config
from video_opd.config_file import parse_config
from video_opd.config_teachers import TeacherModel
from video_opd.errors import ConfigError, DeadlineError, PartLostError

seconds = st.floats(0, 100)


def config_with(**pool: Any) -> Config:
    return parse_config(
        MINIMAL | {"teacher_pool": pool, "max_retries": 2, "video": {"decode_timeout_s": 0.01}}, "test"
    )


# --- what is measured ---


@given(
    st.lists(st.tuples(seconds, st.integers(1, 8), seconds), min_size=1), st.integers(1, 8), st.floats(1, 100)
)
def test_a_merged_batch_counts_once_and_queueing_is_what_the_engine_did_not_take(batches, replicas, wall_s):
    usage = Usage(5.0, replicas)
    for engine_s, num_calls, waited_s in batches:
        for _ in range(num_calls):
            usage.add(engine_s + waited_s, Reply([], engine_s, num_calls))
    metrics = usage.take_metrics(5.0 + wall_s, replicas, replicas)
    total = sum(engine_s for engine_s, _, _ in batches)
    waited = sum(num_calls * waited_s for _, num_calls, waited_s in batches) / sum(n for _, n, _ in batches)
    assert metrics["utilisation"] == pytest.approx(total / (replicas * wall_s), abs=1e-9)
    assert metrics["queue_s"] == pytest.approx(waited, abs=1e-9)


def test_metrics_start_anew_each_time_they_are_taken():
    usage = Usage(0.0, 1)
    usage.add(3.0, Reply([], 2.0, 1, computed_tokens=40, separate_tokens=70))
    for _ in range(3):  # of a merged batch
        usage.add(1.0, Reply([], 0.0, 3, computed_tokens=10, separate_tokens=20))
    usage.add_retry()
    assert usage.take_metrics(4.0, 3, 4) == {
        "queue_s": 1.0,
        "utilisation": 0.25,
        "replicas": 3,
        "replicas_wanted": 4,
        "retries": 1,
        "computed_tokens": 50,
        "separate_tokens": 90,
    }
    after = usage.take_metrics(5.0, 3, 3)
    assert math.isnan(after["queue_s"]) and (after["utilisation"], after["retries"]) == (0, 0)
    assert (after["computed_tokens"], after["separate_tokens"]) == (0, 0)


def test_what_serve_does_not_say_is_left_out():
    usage = Usage(0.0, 2)
    usage.add(3.0, Reply([], 2.0, 1))
    metrics = usage.take_metrics(1.0, math.nan, math.nan)
    assert [name for name, value in metrics.items() if math.isnan(value)] == [
        "utilisation",
        "replicas",
        "replicas_wanted",
    ]
    usage.add(3.0, Reply([], 2.0, 1))
    assert usage.take_metrics(2.0, 2, 2)["utilisation"] == 1.0


def test_metrics_of_a_step_have_the_replicas_that_serve_told_last_and_do_not_ask_it(monkeypatch):
    told = [pool_status("r", wanted=3, actors=("a", "b")), pool_status("r", wanted=1)]
    monkeypatch.setattr(teacher_service.pool, "read_pool", lambda app: told.pop(0))
    config = config_with(num_replicas=2)
    pool = TeacherPool("video_opd/r", config, config.teacher_models[0])
    seen = []
    for asks in (False, True, False, True):
        if asks:
            asyncio.run(pool.counts())
        metrics = asyncio.run(pool.take_metrics())
        seen.append((metrics["teacher/replicas"], metrics["teacher/replicas_wanted"]))
    assert seen == [(2, 2), (2, 3), (2, 3), (1, 1)] and not told


# --- what is repeated ---


class Handle:
    """A Serve handle whose calls do, in turn, what they are told: raise an error, or give an answer."""

    def __init__(self, *outcomes: BaseException | Reply):
        self._outcomes = list(outcomes)
        self.num_calls = 0

    @property
    def score(self) -> Any:
        return self

    def remote(self, *_: Any) -> Any:
        self.num_calls += 1
        outcome = self._outcomes.pop(0)

        async def answer() -> Reply:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        return answer()


ANSWER = Reply(["scores"], 0.0, 1)
DIED = ActorDiedError()


def score_with(handle: Handle, config: Config | None = None) -> tuple[Any, TeacherPool]:
    config = config or config_with()
    pool = TeacherPool("video_opd/r", config, config.teacher_models[0])
    pool._handle = handle
    return asyncio.run(pool.score([])), pool


@pytest.mark.parametrize(
    "lost", [DIED, WorkerCrashedError(), DeadlineError("no answer"), ObjectLostError("00", None, "")]
)
def test_a_call_that_is_lost_is_made_again(lost):
    handle = Handle(lost, lost, ANSWER)
    results, pool = score_with(handle)
    assert (results, handle.num_calls) == (["scores"], 3)
    assert pool._usage.take_metrics(1.0, 1, 1)["retries"] == 2


def test_retries_end():
    handle = Handle(DIED, DIED, DIED, ANSWER)
    with pytest.raises(PartLostError, match="teacher t was lost 3 times"):
        score_with(handle)
    assert handle.num_calls == 3


@pytest.mark.parametrize("cause", [ValueError("bad"), ObjectLostError("00", None, ""), ActorDiedError()])
def test_what_a_replica_raises_itself_is_the_callers_matter(cause):
    raised = RayTaskError("score", "traceback", cause).as_instanceof_cause()
    handle = Handle(raised, ANSWER)
    with pytest.raises(type(cause)):
        score_with(handle)
    assert handle.num_calls == 1


def test_others_go_on_while_serve_starts_and_a_stop_waits_for_what_it_deploys(monkeypatch):
    """Two teachers: Serve's functions are called by one thread at a time, and hold up no loop."""
    config, events = config_with(), []
    pools = [TeacherPool("video_opd/r", config, TeacherModel(name=n, model=n)) for n in ("a", "b")]
    begun, may_go_on = threading.Event(), threading.Event()

    def start(proxy_location: str) -> None:
        events.append("start")
        begun.set()
        assert may_go_on.wait(60), "the loop went on and let it"

    def run_many(targets: list, wait_for_applications_running: bool) -> None:
        events.append(targets[0].name.rpartition("/")[2])

    monkeypatch.setattr(teacher_service.pool.serve, "start", start)
    monkeypatch.setattr(teacher_service.pool.serve, "run_many", run_many)

    async def go() -> None:
        starts = asyncio.gather(*(pool.start() for pool in pools))
        while not begun.is_set():
            await asyncio.sleep(0)
        starts.cancel()
        await asyncio.sleep(0)
        assert events == ["start"] and not starts.done()
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await starts

    asyncio.run(asyncio.wait_for(go(), 120))
    assert sorted(events[1::2]) == ["a", "b"] and events[::2] == ["start", "start"]


def test_predictions_keep_two_calls_at_each_replica_and_a_video_in_one(monkeypatch):
    config = config_with().model_copy(
        update={"rollout": config_with().rollout.model_copy(update={"prompts_per_call": 3})}
    )
    pool = TeacherPool("video_opd/r", config, config.teacher_models[0])
    running, most, calls, turns = 0, 0, [], set()

    async def replicas() -> tuple[float, float]:
        return 2.0, 2.0

    async def attempt(method: str, arguments: Any, what: str, of: int) -> Reply:
        nonlocal running, most
        prompts, number, temperature = arguments
        assert (method, number, temperature) == ("predict", 4, 1.0)
        running, most = running + 1, max(most, running + 1)
        calls.append([p.clip.clip_id for p in prompts])
        turns.add(of)
        await asyncio.sleep(0.001)
        running -= 1
        return Reply([p.prompt_id for p in prompts], 0.0, 1)

    monkeypatch.setattr(pool, "_replicas", replicas)
    monkeypatch.setattr(pool, "_attempt", attempt)
    prompts = [make_prompt(f"p{i}", clip_id=f"v{i % 6}") for i in range(12)]
    assert asyncio.run(pool.predict(prompts, 4, 1.0)) == [p.prompt_id for p in prompts]
    assert calls == [[f"v{i}"] * 2 for i in range(6)] and most == 4
    assert turns == {4}, "a call may wait for others at its replica, so it has their time too"


def test_back_pressure_is_a_pause_and_no_retry(monkeypatch):
    monkeypatch.setattr(teacher_service.pool, "BACK_PRESSURE_PAUSE_S", 0.0)
    handle = Handle(*[BackPressureError(1, 1)] * 5, ANSWER)
    results, pool = score_with(handle)
    assert (results, pool._usage.take_metrics(1.0, 1, 1)["retries"]) == (["scores"], 0)


def test_a_call_that_hangs_is_made_again():
    class Hanging(Handle):
        def remote(self, *call: Any) -> Any:
            return asyncio.sleep(60) if self.num_calls == 0 and not self.count() else super().remote(*call)

        def count(self) -> None:
            self.num_calls += 1

    tree = MINIMAL | {"max_retries": 1, "request_timeout_s": 0.05, "video": {"decode_timeout_s": 0.01}}
    handle = Hanging(ANSWER)
    results, _ = score_with(handle, parse_config(tree, "test"))
    assert (results, handle.num_calls) == (["scores"], 2)


# --- what Serve is told ---


def test_replicas_drain_and_their_number_is_fixed_unless_there_are_bounds():
    options = deployment_options(config_with(num_replicas=3, health_check_s=2.5))
    assert options["num_replicas"] == 3 and "autoscaling_config" not in options
    assert options["graceful_shutdown_timeout_s"] == 600
    assert (options["health_check_period_s"], options["health_check_timeout_s"]) == (2.5, 2.5)
    assert options["max_constructor_retry_count"] == 2
    assert options["ray_actor_options"]["resources"] == {"teacher": 1}


def test_bounds_are_serves_autoscaling():
    pool = {
        "num_replicas": 2,
        "max_replicas": 5,
        "target_ongoing_requests": 1.5,
        "upscale_delay_s": 3,
        "downscale_delay_s": 60,
    }
    options = deployment_options(config_with(**pool))
    scaling = options["autoscaling_config"]
    assert "num_replicas" not in options
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (1, 2, 5)
    assert (scaling.target_ongoing_requests, scaling.upscale_delay_s, scaling.downscale_delay_s) == (
        1.5,
        3,
        60,
    )


def test_a_replica_in_parts_has_a_bundle_for_each_on_one_node():
    options = deployment_options(
        config_with(engine="vllm", tensor_parallel=4, num_gpus=1, num_cpus=2, num_replicas=3)
    )
    assert options["placement_group_bundles"] == [
        {"CPU": 2, "GPU": 1, "teacher": 1},
        *[{"CPU": 2, "GPU": 1}] * 3,
    ]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    actor = options["ray_actor_options"]
    assert (actor["num_cpus"], actor["num_gpus"], actor["resources"]) == (
        2,
        0,
        {"teacher": 1},
    )  # the parts have the GPUs
    on_cpu = deployment_options(config_with(engine="vllm", tensor_parallel=2, num_gpus=0, num_cpus=1))
    assert on_cpu["placement_group_bundles"] == [{"CPU": 1, "teacher": 1}, {"CPU": 1}]
    assert "placement_group_bundles" not in deployment_options(config_with(engine="vllm"))
    serve.deployment(
        TeacherReplica, name="teacher", **options
    )  # which checks that the replica fits in its bundle


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ({"tensor_parallel": 2, "engine": "transformers"}, "tensor_parallel=2 is vLLM's: use engine=vllm"),
        ({"tensor_parallel": 2, "attn_implementation": "eager"}, "is vLLM's: leave one of them out"),
        ({"tensor_parallel": 0, "engine": "vllm"}, "tensor_parallel"),
        ({"num_gpus": 2}, "num_gpus=2, but a process uses one GPU"),
        ({"tensor_parallel": 2, "engine": "vllm", "num_gpus": 0.6}, "a whole GPU for each shard"),
        ({"tensor_parallel": 2, "engine": "vllm", "num_gpus": 0, "num_cpus": 0}, "set num_cpus"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"min_replicas": 1}, "min_replicas=1 without max_replicas"),
        (
            {"num_replicas": 5, "max_replicas": 4},
            "num_replicas=5 is not within min_replicas=1, max_replicas=4",
        ),
        ({"num_replicas": 1, "min_replicas": 2, "max_replicas": 4}, "num_replicas=1 is not within"),
        ({"health_check_s": 0}, "health_check_s"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(pool, said):
    with pytest.raises(ConfigError, match=said):
        config_with(**pool)


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "command"),
        (["scale"], "give a number, or --max"),
        (["scale", "four"], "invalid int value: 'four'"),
        (["scale", "0"], "scale 0: a run needs at least 1 replica"),
        (["scale", "4", "--max", "5"], "either a number, or --min and --max"),
        (["scale", "--min", "2"], "or --max"),
        (["scale", "--min", "0", "--max", "2"], "--min 0: a run needs at least 1"),
        (["scale", "--min", "4", "--max", "2"], "--min is above --max"),
        (["status", "--address", "127.0.0.1:1"], "no Ray answers at 127.0.0.1:1"),
        (["status", "--address", "nowhere"], "no Ray answers at nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, arguments, said):
    assert command_line.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and said in error


@pytest.mark.parametrize(
    ("found", "said"),
    [([], "no Ray runs on this machine"), (["b:2", "a:1"], "several Rays .* a:1, b:2: name")],
)
def test_a_ray_that_is_not_the_only_one_must_be_named(monkeypatch, found, said):
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: set(found))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=said):
        join.find_address("auto")


def pool_status(run: str, teacher: str = "t", **more: Any) -> PoolStatus:
    values: dict[str, Any] = {
        "wanted": 1,
        "starting": 0,
        "draining": 0,
        "bounds": None,
        "pids": (7,),
        "actors": ("a",),
    }
    values |= {"status": ApplicationStatus.RUNNING, "message": ""} | more
    return PoolStatus(run=run, teacher=teacher, **values)


def test_runs_and_teachers_are_named_where_it_is_not_clear_which_is_meant():
    a, b1, b2 = pool_status("a"), pool_status("b", "t1"), pool_status("b", "t2")
    assert command_line.pools_of([a], None) == [a]
    assert command_line.pools_of([a, b1, b2], "b") == [b1, b2]
    assert command_line.pool_of([b1, b2], "t2") == b2
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: command_line.pools_of([], None), "no run is on this Ray"),
        (lambda: command_line.pools_of([a, b1], None), "several runs .* a, b: name one with --run"),
        (lambda: command_line.pools_of([a, b1], "c"), "run c is not on this Ray; running: a, b"),
        (lambda: command_line.pool_of([b1, b2], None), "several teachers, t1, t2: name one with --teacher"),
        (lambda: command_line.pool_of([b1, b2], "t3"), "no teacher t3; it has t1, t2"),
    ]
    for call, said in calls:
        with pytest.raises(ConfigError, match=said):
            call()


def test_more_than_the_cluster_can_hold_is_refused_unless_it_grows():
    assert shared_command_line.describe_shortage(5, "teacher", 5.0, grows=False) is None
    with pytest.raises(ConfigError, match="the nodes of this Ray hold 4 of the resource `teacher`"):
        shared_command_line.describe_shortage(5, "teacher", 4.0, grows=False)
    assert "autoscaler has to add nodes" in (
        shared_command_line.describe_shortage(5, "teacher", 4.0, grows=True) or ""
    )


@pytest.mark.parametrize(
    ("pool", "wanted", "there"),
    [
        (pool_status("r", wanted=1), 1, True),
        (pool_status("r", wanted=2), 2, False),
        (pool_status("r", wanted=1, draining=1), 1, False),
        (pool_status("r", bounds=Bounds(1, 4)), 1, False),
        (pool_status("r", bounds=Bounds(1, 4)), Bounds(1, 4), True),
        (pool_status("r", bounds=Bounds(1, 2)), Bounds(1, 4), False),
        (pool_status("r", bounds=Bounds(2, 4)), Bounds(2, 4), False),
    ],
)
def test_when_a_pool_is_what_was_asked_for(pool, wanted, there):
    assert pool.has(wanted) is there


def test_status_is_one_line_a_teacher():
    text = str(pool_status("r", wanted=4, starting=3, bounds=Bounds(1, 4)))
    assert (
        text == "run r, teacher t: replicas 4 wanted, 1 running, 3 starting, 0 draining; autoscaling 1 to 4"
    )
    failed = str(pool_status("r", status=ApplicationStatus.DEPLOY_FAILED, message="no\n memory"))
    assert failed.endswith("fixed number; DEPLOY_FAILED: no memory")
    assert app_name("video_opd/r", "t") == "video_opd/r/teacher/t"


# --- the benchmark ---


@given(st.integers(1, 8), st.floats(0, CALL_S), st.floats(1, 10))
def test_calls_of_a_window_are_not_rounded(replicas, phase_s, window_s):
    import numpy as np

    answers = np.concatenate([phase_s + CALL_S * np.arange(1, 100) for _ in range(replicas)])
    assert calls_within(answers, 2.0, 2.0 + window_s) == pytest.approx(replicas * window_s / CALL_S)
