"""Teacher replicas and rollout actors of a run are changed from another terminal while it goes on."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.real.test_chaos import ROOT, end, kill_all, last_step, start, wait_for
from tests.real.test_launch import metrics_of, trajectories_of

GROUPS = 6


def command(*arguments: str) -> subprocess.CompletedProcess:
    """`python -m ...` as another terminal would."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
        cwd=ROOT,
        check=False,
    )


@pytest.fixture(scope="module")
def scaled(overrides, tmp_path_factory) -> tuple[Path, str, list[subprocess.CompletedProcess]]:
    """(run folder, what it printed, what the commands answered). It goes on for ever, so a signal ends it."""
    folder = tmp_path_factory.mktemp("scaling")
    options = [
        *("num_steps=1000000", f"groups_per_step={GROUPS}", "max_policy_lag=1", "learner.micro_batch=3"),
        *("rollout.prompts_per_call=3", "rollout.prompts_per_result=1", "rollout.max_response_tokens=6"),
        *(
            "data.eval.max_prompts=4",
            "request_timeout_s=120",
            "start_timeout_s=180",
            f"runs_dir={folder}",
            "run_name=scaled",
        ),
    ]
    run = start(folder, *overrides, *options)
    try:
        wait_for(lambda: last_step(folder / "scaled") >= 2, run, "step 2")
        (address,) = re.findall(r"Ray dashboard: .*, address (\S+)", (folder / "output.txt").read_text())
        commands = [
            *(
                ("teacher_service", "scale", "4"),
                ("actors", "scale", "2"),
                ("actors", "status"),
                ("teacher_service", "status"),
            ),
            *(
                ("teacher_service", "scale", "1"),
                ("actors", "scale", "1"),
                ("actors", "scale", "0"),
                ("actors", "scale", "1000"),
            ),
            *(("actors", "status", "--run", "another"), ("actors", "status", "--address", "127.0.0.1:1")),
        ]
        answers = [
            command(*arguments, *([] if "--address" in arguments else ["--address", address]))
            for arguments in commands
        ]
        at = last_step(folder / "scaled")
        wait_for(lambda: last_step(folder / "scaled") > at, run, "a step after all commands")
        run.send_signal(signal.SIGTERM)
        output = end(run, folder, 128 + signal.SIGTERM)
    except BaseException:
        kill_all(run)
        print((folder / "output.txt").read_text()[-3000:])
        raise
    return folder / "scaled", output, answers


def test_the_commands_change_the_running_run_and_say_so(scaled):
    _, _, answers = scaled
    told = [(a.returncode, a.stdout, a.stderr) for a in answers[:6]]
    assert [code for code, _, _ in told] == [0] * 6, told
    assert "2 running, 2 wanted" in answers[2].stdout
    assert "4 wanted, 4 running" in answers[3].stdout


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (6, "scale 0: a run that samples needs at least 1 rollout actor"),
        (
            7,
            "1000 are asked for, but the nodes of this Ray hold 64 of the resource `rollout` and it has no autoscaler",
        ),
        (8, "run another is not on this Ray; running: scaled"),
        (9, "no Ray answers at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_is_one_line_and_code_2(scaled, number, expected):
    answer = scaled[2][number]
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.startswith("error: ") and expected in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_no_score_is_lost_or_repeated_and_the_pools_history_is_in_the_metrics(scaled):
    folder, _, _ = scaled
    rows, metrics = trajectories_of(folder), metrics_of(folder)
    assert [m["step"] for m in metrics] == list(range(len(metrics)))
    assert Counter(r["step"] for r in rows) == dict.fromkeys(range(len(metrics)), GROUPS)
    assert len({r["trajectory_id"] for r in rows}) == len(rows)
    assert all(len(r["teacher_logprobs"]) == len(r["response_token_ids"]) for r in rows)
    assert metrics[-1]["teacher/scored_tokens"] >= sum(len(r["response_token_ids"]) for r in rows)
    for name, most in (("teacher/replicas", 4), ("actors/running", 2)):
        history = [m[name] for m in metrics if name in m]
        assert history[0] == 1 and max(history) == most and history[-1] == 1, (name, history)
    assert all(m["actors/lost"] == 0 for m in metrics)
