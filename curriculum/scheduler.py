"""The scheduler: which prompts the actors sample next. A pure class, which curriculum/actor.py holds."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curriculum.coupling import anchors_and_frontier
from curriculum.mixture import Mixture
from curriculum.schedule import make_schedule
from curriculum.state import check_state, describe_dropped, records_table, settings_of, student_ious_in
from curriculum.tvdf import SAMPLERS, by_video, disagreement, gaussian_draw
from curriculum.videos import next_videos
from video_opd.config import Config
from video_opd.errors import ConfigError, RunError
from video_opd.grounding import reaches
from video_opd.logs import log, work
from video_opd.types import FailedPrompt, Prompt, ScoredGroup

UNREADABLE = "no answer: its clip cannot be read"
Observation = tuple[str, int, bool]  # of a group: prompt id, number of rollouts, whether all are suspended


def observation(group: ScoredGroup) -> Observation:
    return group.group.prompt.prompt_id, len(group.group.rollouts), not group.group.trajectories


class Scheduler:
    """Issues prompts in shuffled passes; a prompt in flight is not issued again.

    `uniform` passes over the whole pool; the others over the prompts that `start_round` selected.
    Arrays hold the state of the P prompts, in the order of the pool.
    """

    def __init__(self, pool: Sequence[Prompt | FailedPrompt], config: Config):
        self._prompts, self._config, self._curriculum = list(pool), config, config.curriculum
        self._index = {p.prompt_id: i for i, p in enumerate(self._prompts)}
        clips = [p.clip if isinstance(p, Prompt) else None for p in pool]
        self._video = _codes(c.video_path if c else "" for c in clips)
        self._cut = _codes(f"{c.start_s} {c.duration_s}" if c else "" for c in clips)
        self._rng, weights = np.random.default_rng(config.seed), config.data.weights
        sources = [p.source if isinstance(p, Prompt) else "" for p in pool]
        self._mixture = Mixture(sources, weights) if weights else None
        size = len(self._prompts)
        self._teacher_iou = np.full(size, np.nan)
        self._student_iou = np.zeros((size, 0))  # a column for each round
        self._reverse_kl = np.full(size, np.nan)  # in the current round
        self._selected, self._suspended = np.ones(size, bool), np.zeros(size, bool)
        self._num_rollouts, self._last_step = np.zeros(size, np.int64), np.full(size, -1)
        self._dropped = np.full(size, "", object)  # reasons; empty: alive
        self._queue: deque[int] = deque()
        self._in_flight: dict[int, None] = {}
        self._next_selection = None if config.curriculum.kind == "uniform" else 0  # see next_selection()
        self._sizes: list[int] = []  # of the round's steps; empty: all are groups_per_step
        self._first_step = 0  # of the round
        self._asked, self._asked_at = np.zeros(0, np.int64), -1  # see to_ask()
        self._drop_unusable()

    def to_ask(self, step: int) -> np.ndarray:
        """int64: places in the pool of the prompts that are asked in the round that starts at `step`.

        All that are not dropped; with pool_sample, as many of them at random, the same ones at each call.
        """
        if self._asked_at != step:
            alive, self._asked_at = np.flatnonzero(self._dropped == ""), step
            rng = np.random.default_rng((self._config.seed, step))  # a round that starts over: the same
            self._asked = np.sort(rng.permutation(alive)[: self._curriculum.pool_sample])
        return self._asked[self._dropped[self._asked] == ""]

    def not_validated(self, step: int) -> np.ndarray:
        """int64: those of to_ask(step) that the teacher has not answered."""
        asked = self.to_ask(step)
        return asked[np.isnan(self._teacher_iou[asked])]

    def validate(self, teacher_iou: np.ndarray, asked: np.ndarray | None = None) -> None:
        """TRPV: drops the prompts whose tau float64[P] is NaN (unreadable) or too small.

        asked: places of the prompts that were asked; None: all. The others stay as they are.
        """
        which = self._among(asked)
        self._teacher_iou = np.where(which, np.asarray(teacher_iou, np.float64), self._teacher_iou)
        self._drop(which & np.isnan(self._teacher_iou), UNREADABLE)
        if self._curriculum.trpv:
            threshold = self._curriculum.teacher_threshold
            too_small = which & ~reaches(self._teacher_iou, threshold)
            self._drop(too_small, f"teacher IoU is below {threshold}")

    def start_round(
        self,
        student_iou: np.ndarray | None,
        step: int,
        asked: np.ndarray | None = None,
        reverse_kl: np.ndarray | None = None,
    ) -> int | None:
        """Selects the round's prompts and decides its steps' sizes. Returns `next_selection`.

        student_iou: sigma, float64[P], NaN for an unreadable clip or a prompt that was not asked; None where
        the config does not ask the student. asked: as in `validate`. reverse_kl: float64[P], like sigma,
        where rollouts are scored. Raises ConfigError when too few prompts can be selected.
        """
        size = len(self._prompts)
        sigma = np.full(size, np.nan) if student_iou is None else np.asarray(student_iou, np.float64)
        self._student_iou = np.column_stack([self._student_iou, sigma])
        self._reverse_kl = np.full(size, np.nan) if reverse_kl is None else reverse_kl
        if student_iou is not None:
            self._drop(np.isnan(sigma) & self._among(asked), UNREADABLE)
        chosen = self._select_round(np.flatnonzero(self._selectable()))
        self._selected = np.zeros(size, bool)
        self._selected[chosen] = True
        self._queue.clear()
        self._first_step, self._sizes = step, self._plan_round(chosen)
        self._next_selection = step + len(self._sizes) if self._curriculum.kind == "tvdf" else None
        work.step = step
        counts = (self._student_iou.shape[1], len(chosen), size, self._dropped_in_words())
        log.info("round %d: %d of %d prompts; %s", *counts)
        return self._next_selection

    def _plan_round(self, chosen: np.ndarray) -> list[int]:
        """The sizes of the round's steps, the last one of what is left; empty: the round does not end.

        SCC's schedule also queues its prompts.
        """
        full, left = self._config.groups_per_step, len(chosen) * self._curriculum.passes_per_round
        if self._config.schedule_room:
            is_anchor = reaches(self._student_iou[chosen, -1], self._curriculum.scc.anchor_iou)
            order, sizes = make_schedule(chosen[is_anchor], chosen[~is_anchor], self._config, self._rng)
            self._queue.extend(order.tolist())
            return sizes
        if self._curriculum.kind != "tvdf":
            return []
        return [min(full, left - done) for done in range(0, left, full)]

    def step_sizes(self, first: int, until: int) -> list[int]:
        """Prompts of each step from `first` to before `until`, which is at most the end of the round."""
        if not self._sizes:
            return [self._config.groups_per_step] * (until - first)
        return self._sizes[first - self._first_step : until - self._first_step]

    def _among(self, places: np.ndarray | None) -> np.ndarray:
        """bool[P]: the prompts at these places; None: all."""
        which = np.zeros(len(self._prompts), bool)
        which[slice(None) if places is None else places] = True
        return which

    def _selectable(self) -> np.ndarray:
        """bool[P]: not dropped, and answered by teacher and student where the config asks them."""
        usable = self._dropped == ""
        if self._curriculum.asks_teacher:
            usable &= np.isfinite(self._teacher_iou)
        if self._curriculum.asks_student:
            usable &= np.isfinite(self._student_iou[:, -1])
        return usable

    def _drop_unusable(self) -> None:
        """Retires what cannot be used today, if it is not dropped already."""
        states = zip(self._prompts, self._dropped, strict=True)
        if failed := [p for p, dropped in states if isinstance(p, FailedPrompt) and not dropped]:
            self.retire(failed)

    def _drop(self, which: np.ndarray, reason: str) -> None:
        self._dropped[which & (self._dropped == "")] = reason

    def _select_round(self, alive: np.ndarray) -> np.ndarray:
        """Selects the round's prompts from `alive`, places. Raises ConfigError when there are too few."""
        curriculum, size, k = self._curriculum, len(self._prompts), self._curriculum.num_selected
        if k and self._student_iou.shape[1] > 1:  # prompts that failed since round 1 must not end the run
            k = min(k, len(alive))
        if len(alive) < (k or 1):
            raise self._too_few(f"{len(alive)} of {size} prompts are left, {k or 1} are to be selected")
        room = self._config.schedule_room
        if curriculum.kind == "scc":
            scc, sigma, most = curriculum.scc, self._student_iou[alive, -1], room.most if room else np.inf
            bounds = (scc.anchor_iou, scc.frontier_iou, scc.anchor_frac)
            try:
                chosen = alive[anchors_and_frontier(sigma, k, *bounds, self._rng, most)]
            except ValueError as error:
                raise self._too_few(f"{error}: change scc.anchor_frac or the bounds") from None
        elif curriculum.kind == "difficulty":
            gaussian = curriculum.difficulty_mean, curriculum.difficulty_std
            chosen = alive[gaussian_draw(self._student_iou[alive, -1], k or len(alive), *gaussian, self._rng)]
        else:
            chosen = self._sample(alive, k or len(alive))
        if room and len(chosen) < room.num_steps:
            needed = f"{room.num_steps} steps of SCC's schedule (lower num_steps, or set scc.schedule=false)"
            raise self._too_few(f"{len(chosen)} of {size} prompts are selected, fewer than the {needed}")
        in_flight = self._config.num_slots
        if not room and len(chosen) < in_flight:
            needed = f"(max_policy_lag + 1) * groups_per_step = {in_flight} in flight"
            raise self._too_few(f"{len(chosen)} of {size} prompts are selected, fewer than the {needed}")
        return chosen

    def _sample(self, candidates: np.ndarray, k: int) -> np.ndarray:
        """k of the candidates, by the configured sampler, or by the weights of their sources."""
        if self._mixture:
            return self._mixture.select(candidates, k, self._rng)
        sampler = self._curriculum.sampler if self._curriculum.dbtp else "uniform"
        delta = self._disagreement()[candidates]
        assert sampler == "uniform" or np.isfinite(delta).all(), "disagreement needs both answers of a prompt"
        if self._curriculum.select_by == "video":
            return candidates[by_video(SAMPLERS[sampler], delta, self._video[candidates], k, self._rng)]
        return candidates[SAMPLERS[sampler](delta, k, self._rng)]

    def _disagreement(self) -> np.ndarray:
        """In the current round, float64[P]; NaN before the first."""
        if self._curriculum.scores_student:
            return self._reverse_kl
        sigma = self._student_iou[:, -1] if self._student_iou.size else np.full(len(self._prompts), np.nan)
        return disagreement(self._teacher_iou, sigma)

    def _too_few(self, problem: str) -> ConfigError:
        threshold = "teacher_threshold, " if self._curriculum.trpv and self._curriculum.asks_teacher else ""
        advice = f"lower {threshold}num_selected or groups_per_step, or add data"
        if self._curriculum.pool_sample:
            advice = f"raise pool_sample={self._curriculum.pool_sample}, {advice}"
        return ConfigError(f"curriculum: {problem}: {self._dropped_in_words()}; {advice}")

    def _dropped_in_words(self) -> str:
        return describe_dropped(self._dropped, list(self._index), self._student_iou.shape[1])

    def next_selection(self) -> int | None:
        """The step before whose update prompts are selected next; None: never (again)."""
        return self._next_selection

    def next_prompts(self, n: int) -> list[Prompt]:
        """The next n prompts, none of them in flight. Raises RunError when fewer are left.

        With group_by_video, n is the room that a step has left, and may be more than the number returned:
        see curriculum/videos.py.
        """
        if self._curriculum.group_by_video and n:
            issued = self._next_videos(n) or self._next_in_turn(min(n, self._config.rollout.prompts_per_call))
        else:
            issued = self._next_in_turn(n)
        return [p for i in issued if isinstance(p := self._prompts[i], Prompt)]

    def _next_in_turn(self, n: int) -> list[int]:
        """The places of the next n prompts of the queue. Those that are in flight keep their turn."""
        issued, held_back = [], []
        while len(issued) < n:
            if not self._queue:
                self._refill(n - len(issued))
            i = self._queue.popleft()
            if i in self._in_flight:
                held_back.append(i)
            elif not self._dropped[i]:
                self._in_flight[i] = None
                issued.append(i)
        self._queue.extendleft(reversed(held_back))
        return issued

    def _next_videos(self, n: int) -> list[int]:
        """The places of the prompts of whole videos; empty while each video has a prompt in flight."""
        config, issued = self._config, []
        of_call = (n, config.rollout.prompts_per_call, n == config.groups_per_step)
        while not issued:
            if not self._queue:
                self._refill(1)
            issued = next_videos(self._queue, *of_call, self._video, self._dropped, self._in_flight)
            if self._queue:
                break
        self._in_flight |= dict.fromkeys(issued)
        return issued

    def _refill(self, wanted: int) -> None:
        """Queues one more pass over the selected prompts, shuffled; with weights as many draws."""
        alive = np.flatnonzero(self._selected & (self._dropped == ""))
        available = len(alive) - int(np.isin(alive, list(self._in_flight)).sum())
        if available < wanted:
            lack = f"{available} prompts that are not in flight, {wanted} more are needed"
            dropped = f"{np.count_nonzero(self._dropped)} of {len(self._prompts)} were dropped"
            raise RunError(f"the curriculum has {lack} ({dropped}): add data or lower groups_per_step")
        if self._mixture and self._curriculum.kind == "uniform":
            alive = self._mixture.next_pass(alive, self._shuffle)
        self._queue.extend(self._shuffle(alive).tolist())

    def _shuffle(self, which: np.ndarray) -> np.ndarray:
        """A random order; with group_by_video, prompts of one video, and of one cut of it, stay together."""
        which = self._rng.permutation(which)
        if not self._curriculum.group_by_video:
            return which
        _, first, video = np.unique(self._video[which], return_index=True, return_inverse=True)
        return which[np.lexsort((self._cut[which], first[video]))]

    def observe(self, observations: Sequence[Observation], step: int) -> dict[str, float]:
        """Records groups that were trained on or suspended at `step`: their prompts leave flight.

        Returns the step's metrics."""
        work.step = step
        for prompt_id, num_rollouts, suspended in observations:
            i = self._index[prompt_id]
            self._in_flight.pop(i, None)  # a prompt that the learner could not read was retired before
            self._num_rollouts[i] += num_rollouts
            self._last_step[i] = step
            if num_rollouts:  # a demonstration says nothing of the student
                self._suspended[i] = suspended
        return self.metrics()

    def reissue(self) -> None:
        """Issues the prompts in flight again, first: their rollouts were lost with the process that asked."""
        self._queue.extendleft(reversed(self._in_flight))
        self._in_flight = {}

    def retire(self, failed: Sequence[FailedPrompt]) -> None:
        """Drops prompts that cannot be used. In a tvdf round, others take their places."""
        lost = 0
        for failure in failed:
            i = self._index[failure.prompt_id]
            self._in_flight.pop(i, None)
            lost += bool(self._selected[i] and not self._dropped[i])
            self._dropped[i] = failure.reason
        if self._student_iou.size and self._next_selection is not None:
            spare = np.flatnonzero(~self._selected & self._selectable())
            taken = self._sample(spare, min(lost, len(spare)))
            self._selected[taken] = True
            self._queue.extend(taken.tolist())

    def records(self) -> pa.Table:
        """The state of every prompt, in the order of the pool; see schemas.RECORDS."""
        return records_table(
            self._index,
            self._teacher_iou,
            self._student_iou,
            self._disagreement(),
            selected=self._selected,
            num_rollouts=self._num_rollouts,
            last_step=self._last_step,
            suspended=self._suspended,
            dropped=self._dropped,
        )

    def state_dict(self) -> dict[str, Any]:
        """All mutable state: `records` in Arrow, the rest plain values."""
        mixture = {"mixture": self._mixture.state_dict()} if self._mixture else {}
        return mixture | {
            "records": self.records(),
            "in_flight": list(self._in_flight),
            "queue": list(self._queue),
            "asked": (self._asked_at, self._asked.tolist()),
            "round_end": self._next_selection,  # the key of existing checkpoints
            "sizes": (self._first_step, self._sizes.copy()),
            "settings": settings_of(self._config),
            "random_state": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what state_dict returned, and drops what cannot be used today. Raises CheckpointError."""
        check_state(state, list(self._index), self._config)
        records: pa.Table = state["records"]
        self._teacher_iou = records["teacher_iou"].to_numpy()
        self._student_iou = student_ious_in(records)
        self._reverse_kl = records["disagreement"].to_numpy()
        names = ("selected", "suspended", "num_rollouts", "last_step", "dropped")
        columns = [records[name].to_numpy().copy() for name in names]
        self._selected, self._suspended, self._num_rollouts, self._last_step, self._dropped = columns
        self._asked_at, asked = state.get("asked", (-1, []))  # checkpoints of earlier versions lack it
        self._first_step, sizes = state.get("sizes", (0, []))
        self._sizes = list(sizes)
        self._asked, self._queue = np.asarray(asked, np.int64), deque(state["queue"])
        self._in_flight = dict.fromkeys(state["in_flight"])
        self._next_selection = state["round_end"]
        self._rng.bit_generator.state = state["random_state"]
        if self._mixture:
            self._mixture.load_state_dict(state["mixture"])
        self._drop_unusable()

    def metrics(self) -> dict[str, float]:
        selected = self._selected & (self._dropped == "")
        return {
            "curriculum/round": self._student_iou.shape[1],
            "curriculum/in_flight": len(self._in_flight),
            "curriculum/selected": int(selected.sum()),
            "curriculum/dropped": int(np.count_nonzero(self._dropped)),
            "curriculum/suspended": int(self._suspended.sum()),
            "curriculum/seen_frac": float((self._last_step[selected] >= 0).sum() / max(1, selected.sum())),
        }


def _codes(names: Iterable[str]) -> np.ndarray:
    """int64[P]: equal where the names are."""
    return pa.array(names).dictionary_encode().indices.to_numpy()
