"""A run on a cluster that was there before it: it waits for its nodes, outlives the terminal and a node."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.real.runs import GROUPS, PATIENCE_S, SMALL, kept_port, last_step, metrics_of, trajectories_of
from video_opd import ROOT
from video_opd.cluster.join import started_in_time

STEPS = 12
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture
def cluster(monkeypatch):
    """A head with the three roles' resources, as cluster.yaml starts it."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # as in a Ray that launch.py starts
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")  # as in cluster.yaml
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # five in vain, and a node is lost
    roles = {"rollout": 1, "teacher": 1, "learner": 1}
    head = {"num_cpus": 4, "resources": roles, "object_store_memory": 200 << 20, "include_dashboard": True}
    with kept_port() as kept:  # where the node takes jobs; the default may be another Ray's
        head |= {"dashboard_port": 0, "dashboard_agent_listen_port": kept.getsockname()[1]}
        started = started_in_time(lambda: Cluster(initialize_head=True, head_node_args=head))
        yield started
        started.shutdown()


class Job:
    """launch.py submitted as a job, by a client that is gone once the job is on its way."""

    def __init__(self, dashboard: str, *arguments: str):
        self.client = JobSubmissionClient(dashboard)
        environment = json.dumps(
            {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}
        )  # as docs/clusters.md has it
        command = [
            str(RAY),
            "job",
            "submit",
            "--address",
            dashboard,
            "--submission-id",
            "run",
            "--runtime-env-json",
            environment,
        ]
        command += ["--", sys.executable, "-u", str(ROOT / "launch.py"), *arguments]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as terminal:
            self.wait_for(lambda: self.status() == JobStatus.RUNNING, "the job to run")
            terminal.send_signal(signal.SIGKILL)

    def status(self) -> JobStatus | None:
        return next((job.status for job in self.client.list_jobs() if job.submission_id == "run"), None)

    def output(self) -> str:
        return self.client.get_job_logs("run")

    def wait_for(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            status = self.status()
            assert status is None or not status.is_terminal(), f"the job ended, {status}, before {what}"
            assert time.monotonic() < deadline, f"{what} did not come"
            time.sleep(0.5)

    def wait_for_end(self) -> None:
        """Its processes have then given back what they held of the cluster."""
        deadline = time.monotonic() + PATIENCE_S
        while not ((status := self.status()) and status.is_terminal()):
            assert time.monotonic() < deadline, "the job did not end"
            time.sleep(0.5)
        assert status == JobStatus.SUCCEEDED


def test_a_run_waits_for_its_nodes_outlives_one_and_leaves_the_cluster_running(cluster, overrides, tmp_path):
    """An actor and a replica go with the node, and what they had made; there is no other place for them."""
    options = [
        *(
            *SMALL,
            f"num_steps={STEPS}",
            "max_policy_lag=1",
            "request_timeout_s=60",
            "video.decode_timeout_s=30",
        ),
        *("rollout.num_actors=2", "teacher_pool.num_replicas=2", f"runs_dir={tmp_path}", "run_name=joined"),
    ]
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    folder, missing = tmp_path / "joined", "waiting for the cluster: rollout: 1 of 2, teacher: 1 of 2"
    job = Job(f"http://{cluster.head_node.webui_url}", *overrides, *options)
    try:
        job.wait_for(lambda: missing in job.output(), missing)
        node = cluster.add_node(
            num_cpus=4, resources={"rollout": 1, "teacher": 1}, object_store_memory=200 << 20
        )
        job.wait_for(lambda: last_step(folder) >= 3, "step 3")
        cluster.remove_node(node, allow_graceful=False)
        job.wait_for_end()
    except BaseException:
        print(job.output()[-6000:])
        raise
    head: Any = cluster.head_node
    assert head.all_processes["raylet"][0].process.poll() is None
    metrics = metrics_of(folder)
    assert [m["step"] for m in metrics] == list(range(STEPS))
    assert Counter(r["step"] for r in trajectories_of(folder)) == dict.fromkeys(range(STEPS), GROUPS)
    assert (metrics[3]["actors/running"], metrics[-1]["actors/running"], metrics[-1]["actors/wanted"]) == (
        2,
        1,
        2,
    )
    assert "was lost and is replaced" in job.output()
    assert json.loads((folder / "summary.json").read_text())["student_after"]["n"] == 4

    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "--address",
        str(cluster.address),
        *overrides,
        *options,
    ]
    late = subprocess.run(
        [*command, "run_name=late", "start_timeout_s=3"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert late.returncode == 2 and late.stderr.count("\n") == 1
    assert "within 3 s, rollout: 1 of 2, teacher: 1 of 2; needed are learner (each" in late.stderr
