"""benchmarks.claims: reading at equal costs, tuning, verdicts and tables, of rows made by hand."""

import pytest

from benchmarks.claims import tables
from benchmarks.claims.reading import (
    END,
    Comparison,
    Group,
    Place,
    difference,
    read_at,
    tuned,
    with_seconds,
)
from benchmarks.claims.verdicts import (
    CURRICULUM_CLAIMS,
    OBJECTIVE_CLAIMS,
    Verdict,
    ahead,
    forgets,
    passes_its_teacher,
    saves_tokens,
    takes_a_fifth,
)
from benchmarks.curriculum_ablation import places_of as curriculum_places
from benchmarks.objectives import places_of as objective_places


def row(seed: int, end: float, steps: int = 40, update_s: float = 1.0, tokens: float = 7.0, **of_row) -> dict:
    """A run whose mIoU rises in a straight line from 0.5 to `end`."""
    points = [
        {"step": s, "prompts": 32 * s, "rollouts": 32 * s, "teacher_tokens": 32 * tokens * s}
        | {"miou": 0.5 + (end - 0.5) * s / steps, "r1_07": end}
        for s in range(0, steps + 1, 10)
    ]
    scores = {"miou": end, "r1_07": end, "second_task": 0.9, "teacher_miou": 0.8}
    costs = {"train_s": 50.0, "select_s": 0.0, "update_s": update_s}
    return with_seconds({"seed": seed, **scores, **costs, "curve": points} | of_row, update_s, 0.0)


def group(kind: str, ends: list[float], labels: str = "none", **of_rows) -> Group:
    return Group(kind, labels, 2e-4, [row(seed, end, **of_rows) for seed, end in enumerate(ends)])


def judged(judge, *groups: Group, **places: Place) -> list[Verdict]:
    return list(judge(Comparison(groups, {"end": END, **places}, second_task=0.9)))


def test_a_curve_is_read_on_straight_lines_between_its_evaluations():
    curve = [{"x": 0, "miou": 0.5}, {"x": 10, "miou": 0.7}, {"x": 30, "miou": 0.6}]
    read = [read_at(curve, "miou", "x", where) for where in (0, 5, 10, 20, 30)]
    assert read == pytest.approx([0.5, 0.6, 0.7, 0.65, 0.6])


def test_a_curve_that_ends_before_the_place_is_not_read_there():
    curve = [{"x": 0, "miou": 0.5}, {"x": 100, "miou": 0.7}]
    assert read_at(curve, "miou", "x", 100.9) == 0.7  # within a hundredth: as many tokens, nearly
    assert read_at(curve, "miou", "x", 102) is None
    one_ends_early = Group("opd", "none", 1e-4, [row(0, 0.7), row(1, 0.7, steps=20)])
    assert one_ends_early.read("miou", Place("", "step", 40)) is None
    assert one_ends_early.read("miou", Place("", "step", 10)) == pytest.approx({0: 0.55, 1: 0.6})


def test_wall_seconds_are_quiet_ones_after_the_selection_and_without_evaluations():
    timed = with_seconds(row(0, 0.7), update_s=0.5, select_s=8.0)
    assert [point["wall_s"] for point in timed["curve"]] == [8, 13, 18, 23, 28]
    assert read_at(timed["curve"], "miou", "wall_s", 2.0) == 0.5  # while it selects


def trial(lr: float, miou: float, part: str = "tune") -> dict:
    return {"part": part, "lr": lr, "miou": miou}


def test_the_learning_rate_is_the_best_on_the_validation_split():
    found = tuned([trial(5e-5, 0.6), trial(2e-4, 0.7), trial(8e-4, 0.65)])
    assert (found.lr, found.at_edge) == (2e-4, False)
    assert tuned([trial(8e-4, 0.7), trial(2e-4, 0.7)]).lr == 2e-4  # of equals the lowest
    assert tuned([trial(5e-5, 0.7), trial(2e-4, 0.6)]).at_edge
    with pytest.raises(ValueError, match="only validation may"):
        tuned([trial(5e-5, 0.6), trial(2e-4, 0.9, part="learn")])


def test_seeds_are_paired():
    found = difference({0: 0.7, 1: 0.6, 2: 0.5}, {2: 0.4, 1: 0.55, 0: 0.72})
    assert (found.mean, found.low, found.high) == pytest.approx((0.13 / 3, -0.02, 0.1))
    assert (found.num_positive, found.num_seeds, found.apart) == (2, 3, False)
    with pytest.raises(ValueError, match="same --seeds"):
        difference({0: 0.7}, {0: 0.7, 1: 0.6})


@pytest.mark.parametrize(
    ("ends", "seen"),
    [
        ([0.80, 0.75], "yes"),
        ([0.72, 0.66], "yes in every seed, ranges overlap"),
        ([0.72, 0.60], "level"),
        ([0.70, 0.65], "level"),
        ([0.69, 0.60], "no, the reverse in every seed, ranges overlap"),
        ([0.60, 0.55], "no, the reverse"),
        ([0.99], "one seed, no verdict"),
    ],
)
def test_an_order_is_seen_where_all_seeds_agree(ends, seen):
    (verdict,) = judged(
        ahead("opd", "grpo", "miou", "end"), group("opd", ends), group("grpo", [0.7, 0.65][: len(ends)])
    )
    assert verdict.seen == seen


def test_an_order_is_judged_with_each_sort_of_labels():
    groups = [group("opd", [0.7, 0.7])]
    groups += [group("grpo", [0.8, 0.8], "clean"), group("grpo", [0.6, 0.6], "wrong")]
    clean, wrong = judged(ahead("opd", "grpo", "miou", "end"), *groups)
    assert (clean.condition, clean.seen) == ("opd over grpo, clean labels, at the end", "no, the reverse")
    assert (wrong.condition, wrong.seen) == ("opd over grpo, wrong labels, at the end", "yes")


def test_what_is_behind_at_equal_prompts_can_be_ahead_at_equal_seconds():
    groups = [group("opd", [0.7, 0.71]), group("grpo", [0.74, 0.75], "clean", update_s=4.0)]
    places = objective_places(groups)
    assert places["OPD ends"].where == 40
    (prompts,) = judged(ahead("opd", "grpo", "miou", "end"), *groups)
    (seconds,) = judged(ahead("opd", "grpo", "miou", "OPD ends"), *groups, **places)
    assert (prompts.seen, seconds.seen) == ("no, the reverse", "yes")
    assert seconds.figures.startswith("+0.144")  # 0.705 - (0.5 + 0.245 / 4)


def test_a_place_beyond_a_run_is_not_read():
    late = Place("at 60 s", "wall_s", 60)
    groups = group("opd", [0.7]), group("grpo", [0.6], update_s=4.0)
    (verdict,) = judged(ahead("opd", "grpo", "miou", "late"), *groups, late=late)
    assert verdict.seen == "not read"


@pytest.mark.parametrize(
    ("update_s", "seen"),
    [(0.2, "yes"), (0.1, "yes, and by more"), (0.5, "cheaper, by less"), (1.5, "no")],
)
def test_cost_is_compared_with_a_fifth(update_s, seen):
    groups = group("opd", [0.7], update_s=update_s), group("grpo", [0.7], update_s=1.0)
    assert judged(takes_a_fifth("opd", "grpo"), *groups)[0].seen == seen


@pytest.mark.parametrize(
    ("accuracies", "off_policy", "on_policy"),
    [
        ([0.80, 0.85], "yes", "no"),
        ([0.90, 0.895], "no", "yes"),
        ([0.80, 0.90], "in some seeds", "in some seeds"),
        ([0.80], "one seed, no verdict", "one seed, no verdict"),
    ],
)
def test_forgetting_is_a_fall_below_the_start(accuracies, off_policy, on_policy):
    rows = [row(seed, 0.7, second_task=accuracy) for seed, accuracy in enumerate(accuracies)]
    groups = [Group(kind, "none", 1e-4, rows) for kind in ("rkd", "opd")]
    assert judged(forgets("rkd", True), *groups)[0].seen == off_policy
    assert judged(forgets("opd", False), *groups)[0].seen == on_policy


def test_a_student_passes_its_teacher_or_not():
    assert [judged(passes_its_teacher("opd"), group("opd", [end, end]))[0].seen for end in (0.81, 0.7)] == [
        "yes",
        "no, the reverse",
    ]


@pytest.mark.parametrize(
    ("tokens", "ends", "seen"),
    [
        (3.0, [0.75, 0.75], "yes"),
        (3.0, [0.6, 0.6], "saves, at a loss"),
        (3.0, [0.5, 0.73], "saves, at a loss"),  # one seed is level
        (8.0, [0.9, 0.9], "no"),
        (8.0, [0.9], "no"),
        (3.0, [0.75], "saves; of the loss: one seed, no verdict"),
    ],
)
def test_the_gate_saves_tokens_at_no_loss(tokens, ends, seen):
    others = group("TVDF", [0.65] * len(ends), "wrong")
    groups = [group("gate", ends, "wrong", tokens=tokens, steps=60), others]
    (verdict,) = judged(saves_tokens("gate", "TVDF", "prompts"), *groups, **curriculum_places(groups))
    assert verdict.seen == seen
    if seen == "yes":
        assert verdict.figures.startswith("57% of the tokens saved")


def test_one_run_is_read_at_equal_prompts_and_at_equal_tokens():
    groups = [
        group("uniform", [0.7]),
        group("gate", [0.8], tokens=3.5, steps=80),
        group("SCC", [0.7], steps=20),
    ]
    places = curriculum_places(groups)
    assert {name: place.where for name, place in places.items() if place.axis} == {
        "prompts": 1280,
        "tokens": 1280 * 7,
        "fewest prompts": 640,
        "fewest tokens": 640 * 7,
    }
    assert groups[1].read("miou", places["prompts"]) == pytest.approx({0: 0.65})
    assert groups[1].read("miou", places["tokens"]) == pytest.approx({0: 0.8})
    assert groups[2].read("miou", places["tokens"]) is None


def test_all_claims_have_a_verdict_once_all_kinds_are_run():
    for claims, places_of in ((OBJECTIVE_CLAIMS, objective_places), (CURRICULUM_CLAIMS, curriculum_places)):
        kinds = dict.fromkeys(kind for claim in claims for kind in claim.kinds)
        groups = [group(kind, [0.7, 0.6], update_s=1.0) for kind in kinds]
        comparison = Comparison(groups, places_of(groups), second_task=0.9)
        rows = tables.claim_rows(claims, comparison, "objectives")
        assert len(rows) == len(claims) and not [r for r in rows if r["seen here?"] == "not read"]
    assert tables.claim_rows(CURRICULUM_CLAIMS, Comparison(groups[:1], {}, 0.9), "curriculum_ablation") == []


def test_tables_show_the_spread_and_the_command():
    groups = [group("opd", [0.7, 0.8]), group("grpo", [0.6, 0.7], "clean")]
    comparison = Comparison(groups, objective_places(groups), second_task=0.9)
    table = tables.markdown(tables.objective_rows(comparison))
    assert table.splitlines()[2].startswith("| `opd` | none | 0.0002 | 0.750 (0.700 to 0.800) |")
    claims = tables.claim_rows(OBJECTIVE_CLAIMS, comparison, "objectives")
    assert claims[0]["command"] == "`python -m benchmarks.objectives --kinds opd grpo`"
    assert "table" not in table and len(tables.draw(comparison).axes) == 2


def test_fragments_take_their_places_in_a_document(tmp_path):
    document, old = tmp_path / "results.md", "# Results\n\n<!-- a -->\nold\n<!-- end -->\nkept\n"
    document.write_text(old + "<!-- b -->\nstays\n<!-- end -->\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.md").write_text("| new |\n")
    (tmp_path / "out" / "curve.png").write_bytes(b"png")
    for _ in range(2):
        assert tables.paste(document, tmp_path / "out") == ["a"]
        assert document.read_text() == old.replace("old", "| new |") + "<!-- b -->\nstays\n<!-- end -->\n"
    assert (tmp_path / "curve.png").read_bytes() == b"png"
    document.write_text("<!-- a -->\nold\n# All that follows\n")
    with pytest.raises(ValueError, match="no line <!-- end --> after <!-- a -->"):
        tables.paste(document, tmp_path / "out")
    assert "All that follows" in document.read_text()
