"""Two sets of answers side by side: hand-worked numbers, a literal bootstrap, the command, its refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation import __main__ as command
from evaluation import compare as comparison
from evaluation.__main__ import main
from evaluation.compare import compare
from evaluation.predictions import write_answers
from evaluation.protocols import PROTOCOLS
from evaluation.scoring import METRICS, score_answers
from tests.evaluation.test_evaluation import DEMO, bad, question
from video_opd.config_file import load_config
from video_opd.files.run_folder import write_config

STRICT = PROTOCOLS["strict"]
VIDEOS = {"p": "v0", "q": "v0", "r": "v1", "s": "v2"}
IOUS_A = {"p": 0.5, "q": 0.2, "r": 0.8, "s": 1.0}
IOUS_B = {"p": 0.6, "q": 0.2, "r": 0.4, "s": 1.0}


def of_ious(ious, videos=VIDEOS, **changes):
    """Answers with these IoUs to questions whose truth is 0 to 10 s."""
    texts = {name: f"From 0.0 to {iou * 10:.2f} seconds." for name, iou in ious.items()}
    asked = [question(name, videos[name], ((0.0, 10.0),), **changes) for name in ious]
    return score_answers(asked, texts, STRICT, {})


def test_a_case_worked_by_hand():
    """IoUs 0.5 0.2 0.8 1.0 and 0.6 0.2 0.4 1.0: p better by 0.1, r worse by 0.4 and below 0.5 and 0.7."""
    result = compare(of_ious(IOUS_A), of_ious(IOUS_B), STRICT)
    expected = {  # A, B
        "miou": (2.5 / 4, 2.2 / 4),
        "r1@0.3": (3 / 4, 3 / 4),
        "r1@0.5": (3 / 4, 2 / 4),
        "r1@0.7": (2 / 4, 1 / 4),
    }
    for name, (a, b) in expected.items():
        metric = result["metrics"][name]
        assert (metric["a"], metric["b"], metric["difference"]) == pytest.approx((a, b, b - a))
    assert (result["n"], result["num_videos"]) == (4, 3)
    assert (result["better"], result["worse"], result["same"]) == (1, 1, 2)
    (better,), (worse,) = result["most_better"], result["most_worse"]
    assert (better["prompt_id"], better["iou_a"], better["iou_b"]) == ("p", 0.5, pytest.approx(0.6))
    assert (worse["prompt_id"], worse["text_b"]) == ("r", "From 0.0 to 4.00 seconds.")


def test_the_interval_is_that_of_every_resample_there_is():
    """Three videos have 27 equally likely resamples: the exact distribution, without a random number.

    The percentiles of 10,000 draws lie within the values whose exact shares are 1.5 to 3.5 %.
    """
    a, b = of_ious(IOUS_A), of_ious(IOUS_B)
    of_video = {"v0": [0.1, 0.0], "v1": [-0.4], "v2": [0.0]}
    exact = sorted(
        np.mean([d for v in drawn for d in of_video[v]])
        for drawn in ((x, y, z) for x in of_video for y in of_video for z in of_video)
    )
    low, high = compare(a, b, STRICT)["metrics"]["miou"]["interval_95"]
    assert low == pytest.approx(exact[0]) == pytest.approx(-0.4), "1 of 27 resamples: 3.7 %"
    assert high == pytest.approx(exact[-1]) == pytest.approx(0.05), "all of v0: 3.7 %"


def test_the_interval_is_that_of_a_literal_reading(monkeypatch):
    """Loops and lists: a resample draws videos once, and takes both answers to each of their prompts."""
    monkeypatch.setattr(comparison, "NUM_RESAMPLES", 150)
    rng = np.random.default_rng(3)
    names = [str(i) for i in range(40)]
    videos = {name: f"v{rng.integers(0, 9)}" for name in names}
    a, b = (of_ious({name: round(rng.uniform(0.01, 1), 2) for name in names}, videos) for _ in "ab")
    result, different = compare(a, b, STRICT, seed=4), sorted(set(videos.values()))
    draws = np.random.default_rng(4)
    means: list[float] = []
    for _ in range(150):
        drawn = [different[i] for i in draws.integers(0, len(different), len(different))]
        pairs = [(x.iou, y.iou) for v in drawn for x, y in zip(a, b, strict=True) if x.question.video == v]
        means.append(sum(y - x for x, y in pairs) / len(pairs))
    assert result["metrics"]["miou"]["interval_95"] == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert compare(a, b, STRICT, seed=4) == result != compare(a, b, STRICT, seed=5)


def test_pairs_cancel_what_makes_a_video_hard():
    """B is better by 0.1 everywhere, on videos of which half are hard: that is sure, though mIoU is not."""
    hard = {str(i): 0.1 if i % 2 else 0.8 for i in range(20)}
    videos = {name: f"v{name}" for name in hard}
    result = compare(of_ious(hard, videos), of_ious({n: x + 0.1 for n, x in hard.items()}, videos), STRICT)
    assert result["metrics"]["miou"]["interval_95"] == pytest.approx([0.1, 0.1])
    assert result["better"] == 20 and len(result["most_better"]) == comparison.NUM_SHOWN


# --- the command ---


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    write_answers(tmp_path / "a.parquet", of_ious(IOUS_A))
    write_answers(tmp_path / "b.parquet", of_ious(dict(reversed(IOUS_B.items()))))
    return str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")


def test_two_files_are_compared_in_any_order_of_their_rows(files, capsys):
    assert main(["compare", *files]) == 0
    out = capsys.readouterr().out
    assert "mIoU" in out and "0.625" in out and "0.550" in out and "-0.075" in out
    assert "prompts: 1 better in B, 1 worse, 2 the same" in out
    assert "worse: IoU 0.80 -> 0.40  r  a <b> $q$" in out
    assert main(["compare", *files, "--protocol", "vue_tr"]) == 0
    assert "IoU AUC" in capsys.readouterr().out
    assert main(["compare", *files, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"].keys() == set(METRICS) and result["a"]["name"] == files[0]


def test_a_run_is_its_evaluation_or_else_its_last_answers(files, split_folder, tmp_path, capsys):
    """Without a model: answers of summary.json, questions of the run's config."""
    names = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    paths = [f"data.{s}.{key}={split_folder / n}" for s in ("train", "eval") for key, n in names.items()]
    run = tmp_path / "run"
    run.mkdir()
    write_config(run, load_config(DEMO, [*paths, "video.fps=3", "video.max_frames=24"]))
    assert f"--run {run} --protocol strict" in bad(capsys, "compare", str(run), files[0])
    lines = (split_folder / "annotations.txt").read_text().splitlines()
    truth = {f"{line.split()[0]}:{i}": line.split("##")[0].split()[1:] for i, line in enumerate(lines, 1)}
    texts = {name: f"{start} to {end}" for name, (start, end) in truth.items()}
    (run / "summary.json").write_text(json.dumps({"steps": 2, "examples": {"student_after": texts}}))
    assert main(["compare", str(run), str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["miou"] == {"a": 1.0, "b": 1.0, "difference": 0.0, "interval_95": [0.0, 0.0]}
    assert (result["n"], result["same"]) == (len(lines), len(lines))
    assert result["a"]["video"].startswith("3 frames a second, 4 to 24, at most ")
    (run / "evaluation").mkdir()
    Path(files[0]).rename(run / "evaluation" / "strict.parquet")
    assert main(["compare", str(run), files[1], "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 4, "the evaluation's, not summary.json's"
    assert result["a"]["video"].startswith("unknown"), "not the config's: --run takes other values too"
    (run / "evaluation" / "strict.json").write_text(json.dumps({"video": "1 frame a second"}))
    assert main(["compare", str(run), files[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["a"]["video"] == "1 frame a second"


def test_answers_of_before_the_newest_checkpoint_are_not_the_runs(files, tmp_path, monkeypatch, capsys):
    """Of a run that was evaluated, and then resumed. Its last checkpoint is partial: no student is there."""
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    Path(files[0]).rename(run / "evaluation" / "strict.parquet")
    write_config(run, load_config(DEMO, []))
    monkeypatch.setattr(command, "checkpoint_steps", lambda folder: [4, 8, 12])
    monkeypatch.setattr(command, "is_partial", lambda folder, step: step == 12)
    asked = ["compare", str(run), files[1], "--json"]

    def evaluated(step: int) -> None:
        model = {"model": str(run / "checkpoints" / f"step-{step}" / "student")}
        (run / "evaluation" / "strict.json").write_text(json.dumps(model))

    evaluated(4)
    assert f"{run} has no answers of its last student" in bad(capsys, *asked)
    evaluated(8)
    assert main(asked) == 0 and json.loads(capsys.readouterr().out)["n"] == 4
    (run / "evaluation" / "strict.parquet").unlink()
    for steps, is_taken in ((4, False), (8, True), (12, True)):  # 12: its checkpoint could not be written
        end = {"steps": steps, "examples": {"student_after": {"p": "1 to 2"}}}
        (run / "summary.json").write_text(json.dumps(end))
        said = bad(capsys, *asked)  # the demo's questions are others
        assert ("do not answer the same questions" in said or "cannot be read" in said) == is_taken, said
        assert ("has no answers of its last student" in said) != is_taken
    (run / "summary.json").write_text("{")
    assert "summary.json is not JSON" in bad(capsys, *asked)


def test_other_questions_are_refused_and_counted(files, tmp_path, capsys):
    other = str(tmp_path / "other.parquet")
    write_answers(Path(other), of_ious(IOUS_A | {"t": 0.1, "u": 0.2}, VIDEOS | {"t": "v", "u": "v"}))
    line = bad(capsys, "compare", files[0], other)
    assert f"2 prompts are only in {other}" in line and "only in " + files[0] not in line
    write_answers(Path(other), of_ious(IOUS_A, duration_s=13.0)[:3])
    line = bad(capsys, "compare", files[0], other)
    assert f"1 prompts are only in {files[0]}" in line and "3 have another video, query, duration" in line
    assert "(the first: p)" in line


def test_bad_arguments_of_compare_are_one_line(files, tmp_path, capsys):
    assert "'vtime' is not known" in bad(capsys, "compare", *files, "--protocol", "vtime")
    assert "cannot be read as Parquet" in bad(capsys, "compare", files[0], str(tmp_path / "nowhere"))
    assert "has no config.yaml" in bad(capsys, "compare", files[0], str(tmp_path))
