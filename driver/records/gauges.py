"""Exports gauges between steps."""

import asyncio
import time

from driver.held_out import BEFORE, TEACHER
from driver.run import Run

EXPORT_S = 5.0  # Ray 2.60 reports every 10 s and forgets a gauge that was not set for 20 s


async def export_gauges(run: Run) -> None:
    """Every few seconds, exports to Prometheus the state of queues and parts and the last step's metrics."""
    seen, since = run.step, time.monotonic()
    while True:
        if run.step != seen:
            seen, since = run.step, time.monotonic()
        run.clock.advance()
        run.gauges.set(
            {
                "step": run.step,
                "num_steps": run.config.num_steps,
                "seconds_since_step": time.monotonic() - since,
                "learner/restarts": sum(run.num_restarts.values()),
                **run.actors.counts(),
                **(run.buffer.counts() if run.buffer else {}),
            }
        )
        for name in (TEACHER, BEFORE):
            if name in run.evaluations:
                run.gauges.set({"reference/miou": run.evaluations[name]["miou"]}, of=name)
        for kind, number in run.curriculum.num_failed().items():
            run.gauges.set({"dropped_prompts": number}, reason=kind)
        run.gauges.export()
        if run.teacher:
            run.gauges.set_step(await run.teacher.counts())  # last: Serve may not answer
        await asyncio.sleep(EXPORT_S)
