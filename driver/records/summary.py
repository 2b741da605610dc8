"""The content of summary.json."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from driver.records.report import COMPUTED, SEPARATE
from driver.run import Run
from video_opd.grounding import blind_baselines, odd_truth


def summarise(run: Run, records: pa.Table, seconds: Mapping[str, float]) -> dict[str, Any]:
    """`records`: the curriculum's, see schemas.RECORDS; `seconds`: durations besides those of the phases."""
    config, plan, totals, examples = run.config, run.plan, run.totals, run.progress.examples
    dropped = records.filter(pc.field("dropped") != "").to_pylist()
    return {
        **{k: run.evaluations.get(k) for k in ("teacher", "student_before", "student_after")},
        "baselines": blind_baselines(plan.train.prompts, plan.eval.pool, config.seed, config.prompt.span_iou)
        | {"no_video": run.evaluations.get("no_video")},
        "odd_truth": odd_truth((p.answer_spans_s or (), p.clip.duration_s) for p in plan.eval.prompts),
        "steps": run.step,
        "seed": config.seed,
        "loss": config.loss.kind,
        "video": config.video.budget,
        "seconds": {**seconds, **{k.removesuffix("_s"): v for k, v in totals.items() if k.endswith("_s")}},
        "tokens": {k: totals[f"{k}_tokens"] for k in ("rollout", "scored")}
        | {k: total for k, total in totals.items() if k.endswith((COMPUTED, SEPARATE))},
        "teacher_calls": totals["scored_rollouts"],
        **{k: totals[k] for k in ("rollouts", "suspended_rollouts", "teacher_answers", "published_bytes")},
        "dropped": {r["prompt_id"]: r["dropped"] for r in dropped},
        "failed_eval": run.progress.failed_eval,
        "failed_saves": totals["failed_saves"],
        "not_saved": run.not_saved,
        "examples": {k: {p.prompt_id: p.text for p in of} for k, of in examples.items() if k != "no_video"},
    }
