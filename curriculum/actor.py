"""The Ray actor that holds the scheduler."""

from collections.abc import Sequence

from curriculum.scheduler import Scheduler
from video_opd.config import Config
from video_opd.logs import log, start_role_log
from video_opd.types import FailedPrompt, Prompt


class SchedulerActor(Scheduler):
    """The scheduler in its process: a named Ray actor of the run."""

    def __init__(self, pool: Sequence[Prompt | FailedPrompt], config: Config):
        start_role_log(config.run_name, "curriculum")
        super().__init__(pool, config)
        log.info("started with %d prompts, curriculum.kind=%s", len(pool), config.curriculum.kind)

    def __repr__(self) -> str:
        return "curriculum"
