"""Scoring, bootstrap intervals, files of answers, and the command, on answers that nobody has to generate."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from evaluation import scoring
from evaluation.__main__ import ask_model, main
from evaluation.predictions import read_answers, read_questions, write_answers
from evaluation.protocols import PROTOCOLS
from evaluation.scoring import (
    METRICS,
    Question,
    bootstrap_intervals,
    questions_of,
    score_answers,
    summarise_answers,
)
from evaluation.timelines import NUM_SHOWN, draw_timelines
from tests.fakes import make_prompt
from tests.models import write_qwen2_5
from video_opd import ROOT
from video_opd.answers import parse_spans
from video_opd.config_file import load_config
from video_opd.errors import DataError, ParityError
from video_opd.grounding import blind_baselines, evaluate
from video_opd.schemas import EVALUATION
from video_opd.types import FailedPrompt, Prediction, Span

DEMO = ROOT / "configs" / "demo.yaml"
STRICT = PROTOCOLS["strict"]
TEXTS = {
    "right": "From 2.0 to 6.0 seconds.",
    "half": "From 2.0 to 4.0 seconds.",
    "reversed": "From 6.0 to 2.0 seconds.",
    "empty": "From 3.0 to 3.0 seconds.",
    "beyond": "From 2.0 to 600.0 seconds.",
    "huge": f"From 2.0 to {'9' * 5000} seconds.",
    "no number": "I cannot see it.",
    "one number": "At 2.0 seconds.",
    "nan": "From nan to inf seconds.",
    "silent": "",
}


def question(
    prompt_id: str, video: str = "v", answers: tuple[Span, ...] = ((2.0, 6.0),), duration_s: float = 12.0
) -> Question:
    return Question(
        prompt_id=prompt_id, video=video, query="a <b> $q$", duration_s=duration_s, answer_spans_s=answers
    )


@pytest.fixture
def scored():
    questions = [question(name, f"v{i // 2}") for i, name in enumerate([*TEXTS, "missing", "damaged"])]
    return score_answers(questions, TEXTS, STRICT, {"damaged": "video v.mp4 cannot be decoded"})


# --- scoring ---


def test_every_failure_scores_zero_and_says_why(scored):
    expected = {
        "right": (1.0, None),
        "half": (0.5, None),
        "reversed": (0.0, "reversed"),
        "empty": (0.0, "zero length"),
        "beyond": (pytest.approx(4 / 598), None),
        "huge": (0.0, "not finite"),
        "no number": (0.0, "no interval in the answer"),
        "one number": (0.0, "no interval in the answer"),
        "nan": (0.0, "no interval in the answer"),
        "silent": (0.0, "no interval in the answer"),
        "missing": (0.0, "no prediction"),
        "damaged": (0.0, "video v.mp4 cannot be decoded"),
    }
    assert {a.question.prompt_id: (a.iou, a.failure) for a in scored} == expected


def test_the_summary_counts_each_kind_of_failure_and_keeps_all_in_the_denominator(scored):
    summary = summarise_answers(scored, STRICT)
    counts = {key: summary[key] for key in ("n", "unparsed", "reversed", "out_of_range", "missing")}
    assert counts == {"n": 12, "unparsed": 6, "reversed": 1, "out_of_range": 2, "missing": 2}
    assert summary["miou"] == pytest.approx((1.5 + 4 / 598) / 12)
    assert summary["r1@0.5"] == pytest.approx(2 / 12)


def test_the_strict_protocol_gives_launchs_numbers_to_the_last_bit():
    rng = np.random.default_rng(0)
    prompts = [
        make_prompt(f"p{i}", ((float(a), float(a + b)),))
        for i, (a, b) in enumerate(rng.uniform(0.5, 6, (300, 2)))
    ]
    texts = {
        p.prompt_id: "From {:.1f} to {:.1f} seconds.".format(*rng.uniform(0, 12, 2)) for p in prompts[:280]
    }
    answers = [
        Prediction(prompt_id=name, text=text, spans_s=parse_spans(text)) for name, text in texts.items()
    ]
    launchs = evaluate(answers, prompts)
    ours = summarise_answers(score_answers(questions_of(prompts), texts, STRICT, {}), STRICT)
    assert {key: ours[key] for key in launchs} == launchs
    blind = blind_baselines(prompts[:50], prompts, seed=3)
    assert scoring.blind_baselines(questions_of(prompts), prompts[:50], STRICT, seed=3) == blind


def test_one_answer_has_other_numbers_under_other_protocols():
    wanted = question("p", answers=((24.0, 30.0),), duration_s=60.0)
    texts = {"p": "First 00:24 - 00:30, then 40 to 50."}
    numbers = {name: score_answers([wanted], texts, p, {})[0] for name, p in PROTOCOLS.items()}
    assert {name: a.spans_s for name, a in numbers.items()} == {
        "strict": ((24.0, 30.0),),
        "timelens": ((24.0, 30.0),),
        "time_r1": ((40.0, 50.0),),
        "vtimellm": ((24.0, 30.0),),
        "lmms_eval": ((0.0, 24.0),),
        "timelens_strict": ((24.0, 30.0),),
        "strict_sets": ((24.0, 30.0), (40.0, 50.0)),
        "timelens2": ((24.0, 0.0), (40.0, 50.0)),
        "vue_tr": ((24.0, 0.0), (40.0, 50.0)),
    }
    assert {name: a.iou for name, a in numbers.items()} == dict.fromkeys(PROTOCOLS, 0.0) | {
        "strict": 1.0,
        "timelens": 1.0,
        "vtimellm": 1.0,
        "timelens_strict": 1.0,
        "strict_sets": 6 / 16,
    }
    assert [name for name, a in numbers.items() if a.is_reversed] == ["lmms_eval", "timelens2", "vue_tr"]


@pytest.mark.parametrize(
    "bad", [{"duration_s": 0.0}, {"duration_s": math.nan}, {"answers": ()}, {"answers": ((1.0, math.inf),)}]
)
def test_a_question_without_a_truth_to_compare_with_is_refused(bad):
    with pytest.raises(DataError, match="prompt p"):
        question("p", **bad)


def test_an_unlabelled_prompt_is_refused():
    with pytest.raises(DataError, match="prompt u"):
        questions_of([make_prompt("u", None)])


# --- bootstrap ---


def literal_intervals(scored, seed: int, num_resamples: int) -> dict[str, tuple[float, float]]:
    """With lists and loops alone: draws videos, collects all their answers, takes means, sorts them."""
    videos = sorted({a.question.video for a in scored})
    rng = np.random.default_rng(seed)
    means: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(num_resamples):
        drawn = [
            a.iou
            for i in rng.integers(0, len(videos), len(videos))
            for a in scored
            if a.question.video == videos[i]
        ]
        means["miou"].append(sum(drawn) / len(drawn))
        for m in (0.3, 0.5, 0.7):
            means[f"r1@{m}"].append(sum(iou >= m - 1e-9 for iou in drawn) / len(drawn))

    def quantile(values: list[float], q: float) -> float:
        values, at = sorted(values), q * (len(values) - 1)
        low = math.floor(at)
        return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])

    return {name: (quantile(values, 0.025), quantile(values, 0.975)) for name, values in means.items()}


def of_ious(ious, videos):
    texts = {str(i): f"From 0.0 to {iou * 10:.3f} seconds." for i, iou in enumerate(ious)}
    asked = [question(i, f"v{v}", ((0.0, 10.0),)) for i, v in zip(texts, videos, strict=True)]
    return score_answers(asked, texts, STRICT, {})


def test_bootstrap_intervals_are_those_of_a_literal_reading():
    rng = np.random.default_rng(1)
    scored = of_ious(rng.uniform(0.01, 1, 60), rng.integers(0, 17, 60))
    intervals, literal = bootstrap_intervals(scored, STRICT, 5, 200), literal_intervals(scored, 5, 200)
    for name in METRICS:
        assert intervals[name] == pytest.approx(literal[name])
        assert intervals[name][0] < intervals[name][1]


def test_bootstrap_resamples_videos_not_prompts():
    """Forty prompts that say the same of four videos are four observations."""
    ious = np.repeat([0.1, 0.4, 0.6, 0.9], 10)
    low, high = bootstrap_intervals(of_ious(ious, np.repeat(range(4), 10)), STRICT)["miou"]
    alone_low, alone_high = bootstrap_intervals(of_ious(ious, range(40)), STRICT)["miou"]
    assert high - low > 2 * (alone_high - alone_low)


def test_bootstrap_of_one_video_is_a_point():
    low, high = bootstrap_intervals(of_ious([0.2, 0.4], [0, 0]), STRICT)["miou"]
    assert low == high == pytest.approx(0.3)


# --- files ---


def test_answers_written_and_read_back_score_the_same(scored, tmp_path):
    path = tmp_path / "answers.parquet"
    write_answers(path, scored)
    table = pq.read_table(path)
    assert table.schema.equals(EVALUATION)
    assert read_questions(path) == [a.question for a in scored]
    texts, why_missing = read_answers(path)
    assert texts == {a.question.prompt_id: a.text for a in scored}
    assert why_missing["damaged"] == "video v.mp4 cannot be decoded"
    assert score_answers(read_questions(path), texts, STRICT, why_missing) == scored
    rows = {row["prompt_id"]: row for row in table.to_pylist()}
    assert rows["half"] | {"query": ""} == {
        "prompt_id": "half",
        "video": "v0",
        "query": "",
        "duration_s": 12.0,
        "answer_spans_s": [[2.0, 6.0]],
        "text": TEXTS["half"],
        "spans_s": [[2.0, 4.0]],
        "iou": 0.5,
        "unparsed": False,
        "reversed": False,
        "out_of_range": False,
        "missing": False,
        "failure": None,
    }
    assert rows["huge"]["spans_s"][0][1] == math.inf and rows["huge"]["out_of_range"]


def test_timelines_show_some_prompts_with_their_verdict(scored):
    assert len(draw_timelines(scored).axes) == NUM_SHOWN < len(scored)
    figure = draw_timelines(scored[:NUM_SHOWN])
    assert isinstance(figure, Figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0].endswith("(IoU 1.00)") and any(title.endswith("(reversed)") for title in titles)
    assert all(len(axes.patches) >= 1 for axes in figure.axes)
    assert len(draw_timelines(scored[:1]).axes) == 1


# --- the command ---


def write_table(path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture
def dump(scored, tmp_path) -> str:
    write_answers(tmp_path / "dump.parquet", scored)
    return str(tmp_path / "dump.parquet")


@pytest.mark.parametrize("protocol", ["strict", "timelens", "time_r1", "vtimellm", "lmms_eval", "vue_tr"])
def test_a_dump_is_scored_again_without_a_model_or_a_config(dump, tmp_path, capsys, protocol):
    assert main(["--predictions", dump, "--protocol", protocol, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / f"{protocol}.json").read_text())
    assert (result["result"]["n"], result["result"]["missing"], result["num_videos"]) == (12, 2, 6)
    assert result["baselines"].keys() == {"random"}
    out = capsys.readouterr().out
    assert "unknown" in result["video"] and "video budget: unknown" in out
    assert (
        "n 12, unparsed" in out
        and "missing 2" in out
        and PROTOCOLS[protocol].source in out.replace("\n", " ")
    )
    assert (tmp_path / "out" / f"{protocol}.png").read_bytes().startswith(b"\x89PNG")
    rows = {
        row["prompt_id"]: row for row in pq.read_table(tmp_path / "out" / f"{protocol}.parquet").to_pylist()
    }
    assert rows["damaged"]["failure"] == "video v.mp4 cannot be decoded"


def test_predictions_of_another_program_are_scored_on_the_configs_split(
    config, split_folder, tmp_path, capsys
):
    lines = (split_folder / "annotations.txt").read_text().splitlines()
    truth = {f"{line.split()[0]}:{i}": line.split("##")[0].split()[1:] for i, line in enumerate(lines, 1)}
    texts = {name: "{} to {}".format(*span) for name, span in list(truth.items())[1:]} | {
        "of another split": "1 to 2"
    }
    file = write_table(tmp_path / "theirs.parquet", prompt_id=list(texts), text=list(texts.values()))
    assert main(["--predictions", file, "--out", str(tmp_path), *config]) == 0
    result = json.loads((tmp_path / "strict.json").read_text())
    n = len(truth)
    assert result["result"]["miou"] == pytest.approx((n - 1) / n) and result["result"]["missing"] == 1
    assert result["baselines"].keys() == {"best_constant", "random"} and result["other_prompts"] == 1
    assert "1 answers are to none of these prompts" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "strict.parquet").to_pylist()[0]["failure"] == "no prediction"
    assert main(["--predictions", file, "--out", str(tmp_path), "--no-baselines", *config]) == 0
    assert json.loads((tmp_path / "strict.json").read_text())["baselines"] == {}


def test_the_truth_is_scored_as_published_and_odd_truth_is_counted(config, split_folder, tmp_path, capsys):
    """Beyond the clip's end, of zero length, reversed: never clamped, and in every denominator."""
    lines = (split_folder / "annotations.txt").read_text().splitlines()
    spans = ["2.0 13.1", "3.0 3.0", "5.0 2.0", *["1.0 4.0"] * (len(lines) - 3)]
    videos, queries = [line.split()[0] for line in lines], [line.partition("##")[2] for line in lines]
    rows = [f"{v} {s}##{q}\n" for v, s, q in zip(videos, spans, queries, strict=True)]
    (tmp_path / "odd.txt").write_text("".join(rows))
    ids = [f"{video}:{i}" for i, video in enumerate(videos, 1)]
    file = write_table(tmp_path / "p.parquet", prompt_id=ids, text=[s.replace(" ", " - ") for s in spans])
    odd = [*config, f"data.eval.annotations={tmp_path / 'odd.txt'}", "data.eval.clamp_s=5"]
    for protocol in ("strict", "timelens", "lmms_eval"):
        assert main(["--predictions", file, "--protocol", protocol, "--out", str(tmp_path), *odd]) == 0
        result = json.loads((tmp_path / f"{protocol}.json").read_text())
        assert result["odd_truth"] == {"beyond_end": 1, "zero_length": 1, "reversed": 1}
        assert result["result"]["n"] == len(lines) and result["baselines"]["best_constant"]["n"] == len(lines)
        beyond = 11 / 11.1 if protocol == "timelens" else 1.0  # its answers are whole seconds
        assert result["result"]["miou"] == pytest.approx((len(lines) - 3 + beyond) / len(lines))
        out = capsys.readouterr().out
        assert "odd truth, scored as published: beyond end 1, zero length 1, reversed 1" in out
    truths = pq.read_table(tmp_path / "strict.parquet")["answer_spans_s"].to_pylist()
    assert truths[:3] == [[[2.0, 13.1]], [[3.0, 3.0]], [[5.0, 2.0]]]
    (tmp_path / "odd.txt").write_text("".join([*rows[:-1], f"{videos[-1]} nan 3.0##q\n"]))
    assert f"odd.txt:{len(lines)}: nan" in bad(capsys, "--predictions", file, *odd)


def test_a_models_failures_count_and_an_engines_error_is_exit_code_1(config, tmp_path, capsys, monkeypatch):
    """All but vLLM: two prompts are answered, the others' clips fail; no answer on grey frames is parsed."""

    def ask(config, prompts, blanks):
        texts = [f"From {p.answer_spans_s[0][0]} to {p.answer_spans_s[0][1]} seconds." for p in prompts[:2]]
        answers = [
            Prediction(prompt_id=p.prompt_id, text=t, spans_s=())
            for p, t in zip(prompts, texts, strict=False)
        ]
        failed = [FailedPrompt(prompt_id=p.prompt_id, reason="torn") for p in prompts[2:]]
        return [
            [*answers, *failed],
            [Prediction(prompt_id=p.prompt_id, text="?", spans_s=()) for p in prompts],
        ]

    model = ["--model", str(DEMO.parents[1] / "demo" / "models" / "student"), "--out", str(tmp_path), *config]
    monkeypatch.setattr("evaluation.__main__.ask_model", ask)
    assert main(model) == 0
    result = json.loads((tmp_path / "strict.json").read_text())
    n = result["result"]["n"]
    assert (result["result"]["miou"], result["result"]["missing"]) == (pytest.approx(2 / n), n - 2)
    assert result["video"].startswith("2 frames a second, 4 to 24, at most ")
    assert "video budget: 2 frames a second, 4 to 24, at most " in capsys.readouterr().out
    assert result["baselines"]["no_video"]["unparsed"] == n and "best_constant" in result["baselines"]
    assert pq.read_table(tmp_path / "strict.parquet")["failure"].to_pylist() == [
        None,
        None,
        *["torn"] * (n - 2),
    ]

    def fail(config, prompts, blanks):
        raise ParityError("the processor sees 7 tokens")

    monkeypatch.setattr("evaluation.__main__.ask_model", fail)
    assert main(model) == 1
    assert capsys.readouterr().err == "error: the processor sees 7 tokens\n"


def test_a_teacher_is_asked_on_its_own_view_and_scored_against_the_whole_clips_truth(
    config, tmp_path, monkeypatch
):
    """All but vLLM, which gets the crop's frames, those of one frame a second, and the teacher's model."""
    asked = []

    def ask(config, prompts, blanks):
        asked.append((config, prompts, blanks))
        spans = [p.answer_spans_s[0] for p in prompts]
        texts = [f"From {start} to {end} seconds." for start, end in spans]
        pairs = zip(prompts, texts, strict=True)
        return [[Prediction(prompt_id=p.prompt_id, text=text, spans_s=()) for p, text in pairs]]

    model = DEMO.parents[1] / "demo" / "models" / "start"
    view = f"{{name: own, model: {model}, video: {{fps: 1}}, crop_margin_frac: 0.5, prompts: '[02468]$'}}"
    monkeypatch.setattr("evaluation.__main__.ask_model", ask)
    given = ["--teacher", "own", "--out", str(tmp_path), *config, "teacher=null"]
    others = f"{{name: others, model: {model}}}"
    assert main([*given, f"teachers=[{view}, {others}]"]) == 0
    ((of_teacher, prompts, blanks),) = asked
    assert not blanks, "grey frames at the crop's times would show the truth"
    assert prompts and all(prompt.prompt_id[-1] in "02468" for prompt in prompts), "those that it scores"
    assert (of_teacher.student, of_teacher.video.fps) == (str(model), 1.0)
    for prompt in prompts:
        ((start, end),) = prompt.answer_spans_s
        margin = max((end - start) / 2, (4 - (end - start)) / 2)  # 4 frames at least
        times = prompt.clip.frame_indices / prompt.clip.video_fps
        assert start - margin - 1 <= times[0] and times[-1] <= end + margin + 1
        assert len(times) <= 2 * (end - start) + 3
    result = json.loads((tmp_path / "strict.json").read_text())
    assert (result["result"]["miou"], result["model"]) == (1.0, str(model))
    assert result["video"].startswith("1 frames a second") and "0.5 of its length" in result["video"]
    assert result["result"]["n"] == len(prompts) and "no_video" not in result["baselines"]


def test_a_teacher_that_cannot_be_asked_on_its_view_is_one_line(config, tmp_path, capsys):
    write_qwen2_5(tmp_path, hidden=64, padded=0, seed=0)
    capsys.readouterr()
    model = DEMO.parents[1] / "demo" / "models" / "start"
    for keys, said in (
        (f"model: {tmp_path}, crop_margin_frac: 0.5", "counts times from the first frame"),
        (f"model: {model}, prompts: nothing", "scores no prompt of data.eval"),
    ):
        own = f"teachers=[{{name: own, {keys}}}, {{name: others, model: {model}}}]"
        assert said in bad(capsys, "--teacher", "own", *config, "teacher=null", own)


def test_a_model_is_asked_video_by_video_and_answers_are_in_the_callers_order(monkeypatch):
    """Without vLLM: its loop and the encoder are stand-ins. The loop's thread ends, also after an error."""
    asked: list[str] = []
    closed: list[bool] = []

    async def predict(loop, encoder, prompts, blank_video, on_answer):
        asked.extend(p.clip.clip_id for p in prompts)
        return [[Prediction(prompt_id=p.prompt_id, text=str(blank_video), spans_s=())] for p in prompts]

    async def fail(*_, **__):
        raise ParityError("the processor sees 7 tokens")

    stand_in = SimpleNamespace(pad_ids=[], close=lambda: closed.append(True))
    for name in ("engine_loop.EngineLoop", "prompting.PromptEncoder", "vllm_engine.SamplingEngine"):
        monkeypatch.setattr(f"video_opd.models.{name}", lambda *_, **__: stand_in)
    monkeypatch.setattr("video_opd.models.engine_loop.predict", predict)
    prompts = [make_prompt(f"p{i}", clip_id=f"v{i % 2}") for i in range(4)]
    passes = ask_model(load_config(DEMO), prompts, blanks=True)
    assert [[a.prompt_id for a in answers] for answers in passes] == [["p0", "p1", "p2", "p3"]] * 2
    assert asked == ["v0", "v0", "v1", "v1"] * 2
    monkeypatch.setattr("video_opd.models.engine_loop.predict", fail)
    with pytest.raises(ParityError):
        ask_model(load_config(DEMO), prompts, blanks=False)
    assert closed == [True, True]


def bad(capsys, *arguments: str) -> str:
    """The one line that the command says of bad input."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_files_that_are_not_predictions_are_one_line(capsys, tmp_path, config):
    def of(**columns) -> str:
        return bad(capsys, "--predictions", write_table(tmp_path / "p.parquet", **columns), *config)

    assert "no column text" in of(prompt_id=["a"])
    assert "no column prompt_id" in of(text=["a"])
    assert "two rows of prompt a" in of(prompt_id=["a", "b", "a"], text=["1", "2", "3"])
    assert "row 1 has no prompt_id" in of(prompt_id=["a", None], text=["1", "2"])
    assert "has no rows" in of(prompt_id=pa.array([], pa.string()), text=pa.array([], pa.string()))
    assert "columns' types" in of(prompt_id=["a"], text=[[1.0, 2.0]])
    assert "columns' types" in of(prompt_id=["a"], text=pa.array([b"\xff\xfe"]).view(pa.binary()))
    assert "answers none of the" in of(prompt_id=["a"], text=["1 to 2"])
    (tmp_path / "p.parquet").write_bytes(b"PAR1 torn")
    assert "cannot be read as Parquet" in bad(capsys, "--predictions", str(tmp_path / "p.parquet"))
    assert "cannot be read as Parquet" in bad(capsys, "--predictions", str(tmp_path / "nowhere.parquet"))


def test_a_file_without_questions_needs_a_config(capsys, tmp_path):
    file = write_table(tmp_path / "p.parquet", prompt_id=["a"], text=["1 to 2"])
    assert "give it --config" in bad(capsys, "--predictions", file)
    columns = {"prompt_id": ["a"], "text": ["1 to 2"], "video": ["v"], "query": ["q"], "duration_s": [12.0]}
    for spans in ([[[1.0]]], [None], [[]], [[[1.0, None]]], [[[1.0, math.nan]]]):
        file = write_table(
            tmp_path / "p.parquet",
            **columns,
            answer_spans_s=pa.array(spans, pa.list_(pa.list_(pa.float64()))),
        )
        assert "prompt a" in bad(capsys, "--predictions", file)


def test_bad_arguments_are_one_line(capsys, tmp_path, dump):
    assert "protocol 'vtime' is not known" in bad(capsys, "--predictions", dump, "--protocol", "vtime")
    assert "needs --config" in bad(capsys, "--model", str(tmp_path))
    assert "--teacher needs --config" in bad(capsys, "--teacher", "self")
    named = bad(capsys, "--teacher", "self", "--config", str(DEMO))
    assert "--teacher self: the config's teachers are teacher" in named
    assert "has no config.yaml" in bad(capsys, "--run", str(tmp_path))
    assert "leave out --config" in bad(capsys, "--run", str(tmp_path), "--config", str(DEMO))
    assert "there is none: give --config" in bad(capsys, "--predictions", dump, "seed=1")
    assert "config.json" in bad(capsys, "--model", str(tmp_path), "--config", str(DEMO))
    (tmp_path / "config.yaml").write_text(DEMO.read_text())
    assert "no whole checkpoint" in bad(capsys, "--run", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        main(["--predictions", dump, "--model", str(tmp_path)])
    assert caught.value.code == 2
