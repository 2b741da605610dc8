"""The curriculum's part of the configuration."""

from collections.abc import Iterator
from typing import Literal

from video_opd.config_data import ConfigSection, Fraction, PositiveFloat, PositiveInt, key

CurriculumKind = Literal["uniform", "tvdf", "scc", "difficulty"]


class SccConfig(ConfigSection):
    """Student-curriculum coupling: its pool, its schedule and its gate. See curriculum/coupling.py."""

    schedule: bool | None = key(None, "each prompt once, fewer and fewer a step; None: with kind=scc alone")
    gate: bool | None = key(None, "suspend solved rollouts; None: with kind=scc alone")
    anchor_iou: Fraction = key(0.7, "initial student IoU from which a prompt is an Anchor")
    frontier_iou: Fraction = key(0.3, "initial student IoU below which a prompt is Frontier")
    anchor_frac: Fraction = key(0.1, "share of Anchors in the pool")
    suspend_iou: Fraction = key(0.7, "gate: rollouts with at least this IoU are not scored or trained on")

    def problems(self) -> Iterator[str]:
        if self.frontier_iou > self.anchor_iou:
            yield f"frontier_iou={self.frontier_iou} is above anchor_iou={self.anchor_iou}: lower it"


class CurriculumConfig(ConfigSection):
    """Which prompts are sampled: docs/algorithm.md, curriculum/tvdf.py and curriculum/coupling.py."""

    kind: CurriculumKind = key("uniform", "shuffled passes, or as in docs/algorithm.md")
    trpv: bool = key(True, "tvdf, scc: drop prompts that the teacher gets wrong")
    dbtp: bool = key(True, "tvdf: ask the student, select by disagreement; false: select at random")
    sampler: Literal["top_k", "dsus", "bbds", "gwds", "uniform"] = key("top_k", "tvdf: how dbtp selects")
    select_by: Literal["prompt", "video"] = key("prompt", "tvdf: the sampler selects prompts or whole videos")
    num_selected: PositiveInt | None = key(None, "prompts of a round; None: all that may be selected")
    pool_sample: PositiveInt | None = key(None, "prompts asked in a round, at random; None: the whole pool")
    passes_per_round: PositiveInt = key(1, "tvdf: how often a selected prompt is sampled in a round")
    teacher_threshold: Fraction = key(0.7, "TRPV: drop prompts whose teacher IoU is lower")
    num_teacher_predictions: PositiveInt = key(4, "TRPV: teacher answers for each prompt; 1: the greedy one")
    num_student_predictions: PositiveInt = key(4, "student answers for each prompt; 1: the greedy one")
    disagreement: Literal["iou", "reverse_kl"] = key(
        "iou", "dbtp: teacher IoU - student IoU, or their reverse KL along one rollout of each prompt"
    )
    difficulty_mean: Fraction = key(0.3, "difficulty: student IoU of the prompts that are likeliest drawn")
    difficulty_std: PositiveFloat = key(0.2, "difficulty: how far from it the others may be")
    multi_span_iou: Literal["best", "merged"] = key("best", "IoU with several true spans; see grounding.py")
    group_by_video: bool = key(False, "sample the prompts of a video in one step, on one actor")
    scc: SccConfig = SccConfig()

    def problems(self) -> Iterator[str]:
        if self.scc.schedule and self.kind != "scc":
            yield f"scc.schedule=true is for kind=scc, not kind={self.kind}: leave it out"
        if self.schedules and self.group_by_video:
            yield "group_by_video, but SCC's schedule says which prompts a step has: set scc.schedule=false"
        if self.select_by == "video" and self.kind != "tvdf":
            yield f"select_by=video, but only kind=tvdf selects by it, not {self.kind}: leave it out"
        if self.pool_sample and self.kind != "uniform" and not (self.asks_teacher or self.asks_student):
            yield f"pool_sample={self.pool_sample}, but trpv=false and dbtp=false ask nobody: leave it out"
        if self.pool_sample and self.num_selected and self.pool_sample < self.num_selected:
            asked = f"pool_sample={self.pool_sample} is below num_selected={self.num_selected}"
            yield f"{asked}: a round selects from the prompts that are asked; raise pool_sample"
        if self.kind == "difficulty" and not self.num_selected:
            yield "kind=difficulty draws num_selected prompts of the pool: set it, the paper's is 2500"
        if self.disagreement == "reverse_kl" and not self.scores_student:
            yield "disagreement=reverse_kl is for kind=tvdf with dbtp=true alone: leave it out"
        if self.disagreement == "reverse_kl" and self.sampler == "gwds":
            yield "sampler=gwds draws around a difference of IoUs, 0.9, not a reverse_kl: use another sampler"

    @property
    def schedules(self) -> bool:
        """Whether SCC's schedule says how many prompts a step has."""
        return self.kind == "scc" and self.scc.schedule is not False

    @property
    def suspends(self) -> bool:
        """Whether solved rollouts are suspended: SCC's gate, with any kind."""
        return self.kind == "scc" if self.scc.gate is None else self.scc.gate

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher answers the prompts of the pool."""
        by_iou = self.disagreement == "iou" and self.dbtp and self.sampler != "uniform"
        return self.kind in ("tvdf", "scc") and (self.trpv or (self.kind == "tvdf" and by_iou))

    @property
    def asks_student(self) -> bool:
        """Whether the student answers the prompts of the pool at the start of a round."""
        return self.kind in ("scc", "difficulty") or (self.kind == "tvdf" and self.dbtp)

    @property
    def selects_at_random(self) -> bool:
        """Whether prompts are drawn from the pool by nothing but chance."""
        at_random = not self.dbtp or self.sampler == "uniform"
        return self.kind == "uniform" or (
            self.kind == "tvdf" and at_random and self.select_by == "prompt" and not self.pool_sample
        )

    @property
    def scores_student(self) -> bool:
        """Whether the student answers with one rollout for each prompt, which the teacher scores."""
        return self.kind == "tvdf" and self.dbtp and self.disagreement == "reverse_kl"

    @property
    def scores_one_span(self) -> bool:
        """Whether it looks at the IoU of an answer's first interval."""
        looks = self.asks_teacher or self.asks_student or self.suspends
        return looks and self.multi_span_iou == "best"
