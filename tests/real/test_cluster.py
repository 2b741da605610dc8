"""A run on a cluster that was there before it: one of its nodes goes, the run and the rest of the cluster stay."""

import json
import os
from collections import Counter
from typing import Any

import pytest

from tests.real.test_chaos import end, kill_all, last_step, start, wait_for
from tests.real.test_launch import metrics_of, trajectories_of

STEPS, GROUPS = 24, 6


@pytest.fixture
def cluster(monkeypatch):
    """A head with the three roles' resources, as cluster.yaml starts it."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    roles = {"rollout": 1, "teacher": 1, "learner": 1}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "resources": roles, "object_store_memory": 200 << 20})
    yield started
    started.shutdown()


def test_a_run_outlives_a_node_and_leaves_the_cluster_running(cluster, overrides, tmp_path):
    """An actor and a replica go with the node, and what they had made; there is no other place for them."""
    node = cluster.add_node(num_cpus=4, resources={"rollout": 1, "teacher": 1}, object_store_memory=200 << 20)
    options = [
        *(
            f"num_steps={STEPS}",
            f"groups_per_step={GROUPS}",
            "max_policy_lag=1",
            "rollout.num_actors=2",
            "teacher_pool.num_replicas=2",
        ),
        *("rollout.prompts_per_call=3", "rollout.prompts_per_result=1", "rollout.max_response_tokens=6", "learner.micro_batch=3"),
        *(
            "data.eval.max_prompts=4",
            "request_timeout_s=60",
            "video.decode_timeout_s=30",
            "start_timeout_s=180",
            f"runs_dir={tmp_path}",
            "run_name=joined",
        ),
    ]
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    run, folder = start(tmp_path, *overrides, *options, "--address", str(cluster.address)), tmp_path / "joined"
    try:
        wait_for(lambda: last_step(folder) >= 3, run, "step 3")
        cluster.remove_node(node, allow_graceful=False)
        output = end(run, tmp_path)
    except BaseException:
        kill_all(run)
        print((tmp_path / "output.txt").read_text()[-6000:])
        raise
    head: Any = cluster.head_node
    assert head.all_processes["raylet"][0].process.poll() is None
    metrics = metrics_of(folder)
    assert [m["step"] for m in metrics] == list(range(STEPS))
    assert Counter(r["step"] for r in trajectories_of(folder)) == dict.fromkeys(range(STEPS), GROUPS)
    assert (metrics[3]["actors/running"], metrics[-1]["actors/running"], metrics[-1]["actors/wanted"]) == (2, 1, 2)
    assert "was lost and is replaced" in output
    assert json.loads((folder / "summary.json").read_text())["student_after"]["n"] == 4
