"""Saves and loads have a deadline of their own; a late or failed save is no lost learner, a dead rank is."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from learner.learner import Learner
from learner.rank import LearnerRank
from video_opd.config_file import load_demo
from video_opd.errors import DeadlineError, LearnerLostError, SaveError

SOON_S = 0.05
FULL = RayTaskError("save", "Traceback\nOSError: No space left", OSError(28, "No space left on device"))


class Reference:
    """As Ray's: it can be awaited again, and who gives up waiting does not end the call."""

    def __init__(self, call: Any):
        self._call = asyncio.ensure_future(call)

    def __await__(self) -> Any:
        return asyncio.shield(self._call).__await__()


class Method:
    """A method of a rank."""

    def __init__(self, rank: "Rank", name: str):
        self._rank, self._name = rank, name

    def remote(self, *_: Any) -> Reference:
        self._rank.asked.append(self._name)
        return Reference(self._rank.do(self._name))


class Rank:
    """Does one call after the other, as an actor does. `seconds`, `errors`, `answers`: by method."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.errors: dict[str, Exception] = {}
        self.answers: dict[str, Any] = {"sees": ("node", True)}
        self.asked: list[str] = []
        self.done: list[str] = []
        self._turn = asyncio.Lock()

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    async def do(self, name: str) -> Any:
        async with self._turn:
            await asyncio.sleep(self.seconds.get(name, 0))
            if name in self.errors:
                raise self.errors[name]
            self.done.append(name)
            return self.answers.get(name, {})


class Shielded(Learner):
    """A learner of the ranks that it is given, without Ray."""

    def __init__(self, *ranks: Rank, timeout_s: float = SOON_S):
        options = [f"checkpoint_timeout_s={timeout_s}", "request_timeout_s=30", "video.decode_timeout_s=1"]
        self._config, self._ranks, self._published, self._writing = load_demo(options), list(ranks), None, []
        self._turn = asyncio.Lock()


def run(body: Any) -> None:
    asyncio.run(asyncio.wait_for(body(), 120))


def test_a_late_save_is_no_lost_learner_and_the_next_call_waits_for_its_end(tmp_path):
    async def body() -> None:
        rank = Rank()
        rank.seconds["save"] = 3 * SOON_S
        learner = Shielded(rank)
        with pytest.raises(SaveError, match=r"the learner's save did not end within .*checkpoint_timeout_s"):
            await learner.save(tmp_path)
        rank.seconds.clear()
        learner._config = load_demo(["checkpoint_timeout_s=30"])
        await learner._all("update")
        assert rank.done == ["sees", "save", "update"]
        await learner.save(tmp_path)
        assert rank.done.count("save") == 2

    run(body)


def test_an_actor_that_joins_during_a_save_waits_for_its_end_before_its_own_deadline_runs(tmp_path):
    async def body() -> None:
        rank, written = Rank(), asyncio.Event()
        do = rank.do

        async def slowly(name: str) -> Any:
            if name == "save":
                await written.wait()
            return await do(name)

        rank.do = slowly
        learner = Shielded(rank, timeout_s=30)
        saving = asyncio.ensure_future(learner.save(tmp_path))
        while "save" not in rank.asked:
            await asyncio.sleep(0)
        joining = asyncio.ensure_future(learner.send_weights(3, [None], timeout_s=30))
        for _ in range(20):
            await asyncio.sleep(0)
        assert rank.asked == ["sees", "save"]
        written.set()
        await asyncio.gather(saving, joining)
        assert rank.done == ["sees", "save", "send_weights"]

    run(body)


def test_a_rank_that_never_ends_its_save_is_lost(tmp_path):
    async def body() -> None:
        rank = Rank()
        rank.seconds["save"] = 600
        learner = Shielded(rank)
        with pytest.raises(SaveError):
            await learner.save(tmp_path)
        with pytest.raises(LearnerLostError, match="earlier save"):
            await learner._all("update")

    run(body)


@pytest.mark.parametrize("method", ["save", "sees"])
def test_a_rank_that_dies_in_a_save_is_a_lost_learner(tmp_path, method):
    async def body() -> None:
        rank = Rank()
        rank.errors[method] = ActorDiedError()
        with pytest.raises(LearnerLostError, match=f"the learner's {method} was lost"):
            await Shielded(rank, Rank(), timeout_s=30).save(tmp_path)

    run(body)


def test_a_save_that_a_rank_cannot_write_says_why(tmp_path):
    async def body() -> None:
        rank = Rank()
        rank.errors["save"] = FULL
        with pytest.raises(SaveError, match=r"^\[Errno 28\] No space left on device$"):
            await Shielded(rank, timeout_s=30).save(tmp_path)

    run(body)


def test_a_late_load_ends_with_its_deadline_and_no_restart(tmp_path):
    async def body() -> None:
        rank = Rank()
        rank.seconds["load"] = 600
        with pytest.raises(DeadlineError, match=r"the learner's load did not .* checkpoint_timeout_s"):
            await Shielded(rank).load(tmp_path)

    run(body)


def test_what_failed_saves_left_on_another_node_is_removed_before_the_next_one_needs_the_room(tmp_path):
    for name in (".step-2.tmp", ".step-3.tmp", "step-1"):
        (tmp_path / name / "deepspeed").mkdir(parents=True)
    object.__new__(LearnerRank).remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]

    async def body() -> None:
        rank = Rank()
        rank.answers["sees"] = ("node", False)
        rank.errors["save"] = FULL
        with pytest.raises(SaveError):
            await Shielded(rank, timeout_s=30).save(tmp_path)
        assert rank.asked == ["sees", "remove_unfinished", "save"]

    run(body)


def test_a_rank_elsewhere_hands_over_all_parts_also_when_the_disk_here_is_full(tmp_path, monkeypatch):
    taken: list[int] = []

    async def parts(n: int = 3):
        for number in range(n):
            yield number_of(number)

    async def number_of(number: int) -> int:
        taken.append(number)
        return number

    def full(folder: Path, part: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("learner.learner.write_part", full)
    method: Any = type("M", (), {"remote": lambda *_: parts(), "options": lambda self, **_: self})()
    rank: Any = type("R", (), {"read_folder": method})()

    async def body() -> None:
        with pytest.raises(OSError, match="No space left"):
            await Shielded(timeout_s=30)._fetch(rank, tmp_path)
        assert taken == [0, 1, 2]

    run(body)


def test_the_port_of_rank_0_is_kept_for_it(monkeypatch):
    monkeypatch.setattr("learner.rank.start_role_log", lambda *_: None)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    rank = LearnerRank("learner-0", load_demo(), 0)
    address = rank.address()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(address)
    socket.create_server(address).close()
