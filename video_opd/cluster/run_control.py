"""The line between a running run and whoever asks it for something: one named Ray actor, `video_opd/NAME/control`."""

import ray

from video_opd.errors import ConfigError

NAMESPACE = "video_opd"
_SUFFIX = "/control"


class RunControl:
    """Holds what was asked for until the run takes it, and what the run last said of itself."""

    def __init__(self):
        self._num_actors: int | None = None
        self._status: dict[str, float] = {}

    def __repr__(self) -> str:
        return "control"

    def ask_for_actors(self, num_actors: int) -> None:
        """The run is to have so many rollout actors."""
        self._num_actors = num_actors

    def exchange(self, status: dict[str, float]) -> int | None:
        """The run's side: says how it stands, takes what was asked for; None: nothing since the last time."""
        self._status = status
        asked, self._num_actors = self._num_actors, None
        return asked

    def status(self) -> dict[str, float]:
        """As the run said last; empty before the first time."""
        return self._status


def create_control(name: str):
    """The actor of the run `name`, video_opd/NAME. Raises ConfigError where there is one."""
    try:
        return ray.remote(RunControl).options(name=name + _SUFFIX, num_cpus=0, max_restarts=-1).remote()
    except ValueError as error:  # Ray's, for a name that is taken
        raise ConfigError(
            f"a run {name.removeprefix(f'{NAMESPACE}/')} goes on on this Ray: choose another run_name"
        ) from error


def running_runs() -> list[str]:
    """NAME of every run on this Ray."""
    controls = [str(n) for n in ray.util.list_named_actors() if str(n).endswith(_SUFFIX)]
    return sorted(name.removeprefix(f"{NAMESPACE}/").removesuffix(_SUFFIX) for name in controls)


def control_of(run: str):
    """Raises ValueError where no such run is."""
    return ray.get_actor(f"{NAMESPACE}/{run}{_SUFFIX}", namespace=NAMESPACE)
