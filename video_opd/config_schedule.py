"""The room of SCC's schedule, which curriculum/schedule.py fills (arXiv 2609.40055 App. B.2)."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScheduleRoom:
    """In prompts. The last step is a quarter of the others, half of it repeats: the paper's 8 and 4 of 32.

    Our reading of them: an epoch of 2,500 has 78 full steps and 4 prompts, repeated once for 8 GPUs.
    """

    num_steps: int
    full: int  # of every step but the last
    responses: int  # to each prompt

    @property
    def last(self) -> int:
        return max(1, self.full // 4)

    @property
    def num_repeats(self) -> int:
        """Of the last step, at most: prompts that were presented before."""
        return self.last // 2

    @property
    def most(self) -> int:
        """Prompts that can be presented once each."""
        return self.full * (self.num_steps - 1) + self.last - self.num_repeats

    def num_sequences(self, step: int) -> int:
        """n_t of eq. 8: the loss of a step is divided by so many, whatever it presents."""
        return (self.last if step == self.num_steps - 1 else self.full) * self.responses

    def problems(self, num_selected: int | None) -> Iterator[str]:
        if num_selected and not self.num_steps <= num_selected <= self.most:
            steps = f"num_steps={self.num_steps} of groups_per_step={self.full}"
            has = f"SCC's schedule of {steps} has room for {self.num_steps} to {self.most}"
            yield f"curriculum.num_selected={num_selected}, but {has}: change one, or set scc.schedule=false"
