"""How other processes reach a run: through a named Ray actor, `video_opd/NAME/control`."""

import ray

from video_opd.errors import ConfigError

NAMESPACE = "video_opd"
_SUFFIX = "/control"


class RunControl:
    """Holds the last request until the run takes it, and the run's last status."""

    def __init__(self):
        self._num_actors: int | None = None
        self._status: dict[str, float] = {}

    def ask_for_actors(self, num_actors: int) -> None:
        self._num_actors = num_actors

    def exchange(self, status: dict[str, float]) -> int | None:
        """Called by the run: stores its status, returns and clears the number of actors requested, if any."""
        self._status = status
        asked, self._num_actors = self._num_actors, None
        return asked

    def status(self) -> dict[str, float]:
        """The run's last status; empty before the first."""
        return self._status


def create_control(name: str):
    """Starts the control actor of the run `name`, video_opd/NAME. Raises ConfigError if there is one."""
    try:
        return ray.remote(RunControl).options(name=name + _SUFFIX, num_cpus=0, max_restarts=-1).remote()
    except ValueError as error:  # the name is taken
        run = name.removeprefix(f"{NAMESPACE}/")
        raise ConfigError(f"a run {run} is already running on this Ray: choose another run_name") from error


def running_runs() -> list[str]:
    """The name of every run on this Ray."""
    controls = [str(n) for n in ray.util.list_named_actors() if str(n).endswith(_SUFFIX)]
    return sorted(name.removeprefix(f"{NAMESPACE}/").removesuffix(_SUFFIX) for name in controls)


def control_of(run: str):
    """The control actor of a run. Raises ValueError if there is no such run."""
    return ray.get_actor(f"{NAMESPACE}/{run}{_SUFFIX}", namespace=NAMESPACE)
