"""Tiny real models and real clips for tests of the engines themselves."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # its handlers abort processes that Ray forks

os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # threads of Serve that outlive a Ray start no other

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.clips import write_split
from demo.models import Size, build_model, build_processor
from tests.models import write_qwen2_5
from video_opd.cluster.join import started_in_time
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.datasets import read_prompts
from video_opd.models.patches import pixel_values
from video_opd.models.policy import BANNED
from video_opd.models.prompting import PromptEncoder
from video_opd.types import (
    EncodedPrompt,
    FinishReason,
    Prompt,
    ScoredGroup,
    TeacherScores,
    TopK,
    Trajectory,
    TrajectoryGroup,
)

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
SIZES = {
    "student": Size(hidden=64, layers=2, vision_hidden=32),
    "teacher": Size(hidden=96, layers=2, vision_hidden=32),
}
SETTINGS = {  # of generation, in both models' folders: nothing may depend on them; transformers saves no such
    **{"do_sample": False, "temperature": 0.01, "top_k": 1, "top_p": 0.01, "min_p": 0.9, "typical_p": 0.01},
    **{"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "exponential_decay_length_penalty": [0, 9.0]},
    **{"suppress_tokens": list(range(300)), "begin_suppress_tokens": list(range(300)), "min_new_tokens": 4},
    **{"bad_words_ids": [[i] for i in range(300)], "forced_eos_token_id": 301, "sequence_bias": [[[7], 9.0]]},
    **{"max_new_tokens": 2, "num_beams": 2, "stop_strings": ["1"], "return_dict_in_generate": True},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with `student` and `teacher`, random weights large enough for sharp distributions."""
    folder = tmp_path_factory.mktemp("models")
    processor = build_processor()
    for seed, (name, size) in enumerate(SIZES.items()):
        model = build_model(size, processor.tokenizer, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        path = folder / name / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | SETTINGS))
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Small train and eval splits in Charades-STA layout."""
    folder = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 16), ("eval", 4)):
        write_split(folder / split, split, count, ("colour", "shape"))
    return folder


@pytest.fixture(scope="session")
def qwen2_5_pair(tmp_path_factory) -> list[str]:
    """Overrides: a student and a teacher of Qwen2.5-VL, whose vocabulary is padded."""
    folder = tmp_path_factory.mktemp("qwen2_5_pair")
    write_qwen2_5(folder / "student", hidden=64, padded=0, seed=0)
    write_qwen2_5(folder / "teacher", hidden=96, padded=7, seed=1)
    return [f"{name}={folder / name}" for name in ("student", "teacher")]


@pytest.fixture(scope="session")
def overrides(models, clips, tmp_path_factory) -> list[str]:
    """What turns configs/demo.yaml into a run on the tiny models and clips."""
    data = [
        f"data.{split}.{key}={clips / split / name}"
        for split in ("train", "eval")
        for key, name in (
            ("annotations", "annotations.txt"),
            ("lengths", "lengths.csv"),
            ("videos", "videos"),
        )
    ]
    runs = tmp_path_factory.mktemp("runs")
    cache = tmp_path_factory.mktemp("frames")
    return [
        f"student={models / 'student'}",
        f"teacher={models / 'teacher'}",
        f"runs_dir={runs}",
        f"video.cache_dir={cache}",
        *data,
    ]


@pytest.fixture(scope="session")
def config(overrides) -> Config:
    return load_config(DEMO, overrides)


@pytest.fixture(scope="session")
def prompts(config) -> list[Prompt]:
    return read_prompts(config.data.train, config.video, 32)


@pytest.fixture(scope="session")
def encoder(config) -> PromptEncoder:
    return PromptEncoder(config.student, config.prompt, config.video)


@torch.no_grad()
def reference_logprobs(
    model, prompt: EncodedPrompt, response: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """float32[N, V]: the policy at each response position, by a plain forward over one sequence."""
    ids = torch.tensor(np.concatenate([prompt.token_ids, response])[None], dtype=torch.int64)
    types = torch.zeros_like(ids)
    types[0, : len(prompt.token_types)] = torch.tensor(prompt.token_types)
    logits = model(
        input_ids=ids,
        mm_token_type_ids=types,
        pixel_values_videos=pixel_values([prompt], "cpu"),
        video_grid_thw=torch.tensor([prompt.video_grid_thw]),
    ).logits[0]
    policy = logits[len(prompt.token_ids) - 1 : -1].double() / temperature
    policy[:, [model.config.image_token_id, model.config.video_token_id]] = BANNED
    return policy.log_softmax(-1).float().numpy()


def scored_groups(
    prompts: list[Prompt],
    encoder: PromptEncoder,
    seed: int,
    top_k: int = 8,
    rollouts: int = 1,
    sampled: bool = True,
) -> list[ScoredGroup]:
    """Made-up responses of several lengths with made-up scores.

    `sampled` false: nobody sampled them, as in demonstrations.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for prompt in prompts:
        encoded, trajectories, scores = encoder.encode(prompt), [], []
        for number in range(rollouts):
            n = int(rng.integers(3, 9))
            trajectories.append(
                Trajectory(
                    trajectory_id=f"{prompt.prompt_id}@0#{number}",
                    prompt_id=prompt.prompt_id,
                    policy_version=0,
                    prompt_token_ids=encoded.token_ids if sampled else encoded.token_ids[:0],
                    prompt_fingerprint=encoded.fingerprint if sampled else None,
                    response_token_ids=rng.integers(0, 400, n).astype(np.int32),
                    actor_logprobs=(rng.normal(-6.5, 0.3, n) * sampled).astype(np.float32),
                    finish_reason=FinishReason.STOP,
                    text="",
                    predicted_spans_s=(),
                )
            )
            logprobs = np.log(rng.dirichlet(np.ones(top_k + 1), n)[:, :top_k]).astype(np.float32)
            ids = np.stack([rng.choice(400, top_k, replace=False) for _ in range(n)]).astype(np.int32)
            scores.append(
                TeacherScores(
                    trajectory_id=trajectories[-1].trajectory_id,
                    teacher_id="teacher",
                    teacher_logprobs=rng.normal(-6.5, 0.5, n).astype(np.float32),
                    top_k=TopK(ids=ids, logprobs=logprobs),
                    hidden=rng.normal(0, 0.3, (n, SIZES["teacher"].hidden)).astype(np.float32),
                    entropy=rng.exponential(1.0, n).astype(np.float32),
                )
            )
        rewards = tuple(float(r) for r in rng.random(rollouts))
        group = TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories))
        groups.append(ScoredGroup(group=group, scores=tuple(scores), rewards=rewards))
    return groups


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of this machine alone, without a dashboard, for the tests of one module."""
    import ray

    from driver import start_ray

    start_local = partial(start_ray.start_local, include_dashboard=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start_ray, "start_local", start_local)
        start_ray.start_ray(load_config(DEMO, ["learner.world_size=6"]), address="local")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def shared_ray():
    """A cluster that the launches of one module join: to start Ray and Serve is a fifth of a tiny run."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_worker_niceness", "0")  # these two as in a Ray that launch.py starts
        environment.setenv("RAY_prestart_worker_first_driver", "0")
        head = {
            "num_cpus": 16,
            "resources": {"learner": 2, "rollout": 2, "teacher": 2},
            "object_store_memory": 1 << 30,
        }
        head_node = {"initialize_head": True, "head_node_args": head | {"include_dashboard": False}}
        cluster = started_in_time(lambda: Cluster(**head_node))
        environment.setenv("RAY_ADDRESS", str(cluster.address))
        yield
        cluster.shutdown()
