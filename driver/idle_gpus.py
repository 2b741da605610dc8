"""More teacher replicas, which answer the pool on the GPUs of a learner that has not started."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from driver.run import Run
from teacher_service.pool import TeacherPool
from teacher_service.scaling import read_pool, set_replicas
from video_opd.cluster.deadline import with_deadline
from video_opd.errors import RunError
from video_opd.logs import log

FEWEST_PROMPTS = 512  # fewer are answered before another replica has loaded its model
POLL_S = 0.5


@asynccontextmanager
async def more_replicas(run: Run, num_prompts: int) -> AsyncIterator[None]:
    """In the block run.idle_replicas more replicas answer, each as soon as it is up; then they have ended.

    Nothing waits for their start: a replica without a place is one that does not help.
    """
    teacher, number = run.teacher, run.config.teacher_pool.num_replicas
    if not run.idle_replicas or num_prompts < FEWEST_PROMPTS:
        yield
        return
    assert isinstance(teacher, TeacherPool), "idle_replicas counts those of one teacher"
    log.info("TRPV: %d more teacher replicas on the GPUs of the learner", run.idle_replicas)
    await asyncio.to_thread(set_replicas, teacher.app, number + run.idle_replicas)
    yield
    await asyncio.to_thread(set_replicas, teacher.app, number)
    # Serve waits request_timeout_s for a replica that still loads or hangs, and then kills it
    timeout_s = run.config.request_timeout_s + run.config.start_timeout_s
    await with_deadline(timeout_s, _has(teacher.app, number), "the end of the further teacher replicas")


async def _has(app: str, number: int) -> None:
    while True:
        with suppress(RunError):  # Serve may not answer at once
            if (await asyncio.to_thread(read_pool, app)).has(number):
                return
        await asyncio.sleep(POLL_S)
