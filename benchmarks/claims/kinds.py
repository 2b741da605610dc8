"""Objectives and curricula as overrides of the demo, and what all are compared over."""

from benchmarks.claims.case import GROUPS

STEPS, ROUNDS, ROLLOUTS = 32, 4, 8  # updates; rounds of DBTP; G of GRPO
TIMED_STEPS = 12
LEARNING_RATES = (5e-5, 2e-4, 8e-4)
TOKENS_A_RESPONSE = 7  # of the demo's answers
LONGER = 3  # times the updates, after which the gate's run ends whatever it has scored

GRPO = ("loss={kind: grpo}", f"rollout.rollouts_per_prompt={ROLLOUTS}")
OWN = "grpo, own prompts"
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "opd": ("loss={kind: opd, clamp: 3, center: batch}",),
    "opd_topk": ("loss={kind: opd_topk, top_k: 32, clamp: 3}",),
    "opd_full": ("loss={kind: opd_full}",),
    "grpo": GRPO,
    OWN: (*GRPO, "curriculum.kind=difficulty", "curriculum.trpv=false"),
    "off_policy_rkd": ("loss={kind: off_policy_rkd, clamp: 3}",),
    "off_policy_fkd": ("loss={kind: off_policy_fkd}",),
    "sft": ("loss={kind: sft}",),
}
SEE_NO_LABEL = ("opd", "opd_topk", "opd_full")  # in training, where every prompt is used
TVDF = ("curriculum.kind=tvdf",)
SCHEDULE = ("curriculum.kind=scc", "curriculum.scc.schedule=true")
CURRICULA: dict[str, tuple[str, ...]] = {
    "uniform": ("curriculum.kind=uniform",),
    "TRPV": (*TVDF, "curriculum.dbtp=false"),
    "DBTP": (*TVDF, "curriculum.trpv=false"),
    "TVDF": TVDF,
    **{f"TVDF {name}": (*TVDF, f"curriculum.sampler={name}") for name in ("dsus", "bbds", "gwds")},
    "TVDF reverse_kl": (*TVDF, "curriculum.disagreement=reverse_kl"),
    "gate": (*TVDF, "curriculum.scc.gate=true"),
    "schedule": (*SCHEDULE, "curriculum.scc.gate=false"),
    "SCC": SCHEDULE,
}


def objective_overrides(kind: str, steps: int) -> tuple[str, ...]:
    """GRPO's own selection is a quarter of the presentations, each seen four times."""
    own = (f"curriculum.num_selected={GROUPS * steps // 4}", "curriculum.passes_per_round=4")
    return OBJECTIVES[kind] + (own if kind == OWN else ())


def curriculum_overrides(kind: str, steps: int) -> tuple[str, ...]:
    """With opd_topk. A round is a quarter of the updates, each of its prompts seen once.

    The gate alone goes on until it has scored what `steps` updates score without it: its curve has a point
    of as many prompts, and one of as many teacher tokens. SCC's schedule fixes its own number of prompts.
    """
    values = OBJECTIVES["opd_topk"] + CURRICULA[kind]
    if CURRICULA[kind][:1] == TVDF:
        values += (f"curriculum.num_selected={GROUPS * steps // ROUNDS}",)
    if kind == "gate":
        budget = steps * GROUPS * TOKENS_A_RESPONSE
        values += (f"num_steps={LONGER * steps}", f"max_scored_tokens={budget}")
    return values
