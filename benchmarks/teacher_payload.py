"""What a teacher sends per response token, and its cost: log-probs, top-K, hidden states or logits.

`python -m benchmarks.teacher_payload [--quick]`: a language-model head of Qwen3-VL's vocabulary on random
hidden states. `score s`: the teacher's work after the last layer. `trip s`: the object store's put and get.
`learner s`: what the learner computes to recover the teacher's log-probs. The last line is one JSON object.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.command import make_parser, print_result, timed
from teacher_service.engine import top_k_of
from video_opd.models.forward import token_logprobs
from video_opd.types import TopK

VOCABULARY, HIDDEN, TOKENS, REPEATS = 151_936, 2048, 512, 3
TOP_K = (1, 8, 32, 64, 256, 1024)


def median_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """(median seconds of REPEATS calls after a warm-up, the last result)."""
    runs = [timed(work) for _ in range(1 + REPEATS)][1:]
    return float(np.median([seconds for seconds, _ in runs])), runs[-1][1]


def measure(tokens: int) -> list[dict[str, Any]]:
    """One row for each kind of payload."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = torch.randn(VOCABULARY, HIDDEN, device=device) / HIDDEN**0.5
    hidden = 3 * torch.randn(tokens, HIDDEN, device=device)
    targets = torch.randint(VOCABULARY, (tokens,), device=device)

    def apply_head(states: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(states.copy()).to(device).matmul(head.T).log_softmax(-1).cpu()

    def apply_softmax(logits: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(logits.copy()).to(device).log_softmax(-1).cpu()

    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any] | None]] = {
        "log-probs": (lambda: token_logprobs(hidden.matmul(head.T), targets).cpu().numpy(), None),
        **{f"top-{k}": (lambda k=k: top_k_of(hidden.matmul(head.T), k), None) for k in TOP_K},
        "hidden states": (lambda: hidden.cpu().numpy(), apply_head),
        "logits": (lambda: hidden.matmul(head.T).cpu().numpy(), apply_softmax),
    }
    rows = []
    for name, (score, restore) in ways.items():
        score_s, payload = median_s(score)
        trip_s, arrived = median_s(lambda payload=payload: ray.get(ray.put(payload)))
        learner_s = median_s(lambda restore=restore, arrived=arrived: restore(arrived))[0] if restore else 0.0
        arrays = (payload.ids, payload.logprobs) if isinstance(payload, TopK) else (payload,)
        size = sum(array.nbytes for array in arrays) / tokens
        row = {"sends": name, "bytes_per_token": size, "score_s": score_s, "trip_s": trip_s}
        rows.append(row | {"learner_s": learner_s})
    return rows


def main() -> None:
    quick = make_parser("teacher_payload", __doc__, "64 response tokens").parse_args().quick
    tokens = 64 if quick else TOKENS
    torch.set_num_threads(1)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=1, include_dashboard=False, **quiet)
    rows = measure(tokens)
    ray.shutdown()
    shown = [
        {
            "sends": row["sends"],
            "bytes a token": f"{row['bytes_per_token']:,.0f}",
            **{f"{name} s": f"{row[f'{name}_s']:.4f}" for name in ("score", "trip", "learner")},
        }
        for row in rows
    ]
    title = f"{tokens} tokens, V = {VOCABULARY:,}, H = {HIDDEN}"
    print_result({"tokens": tokens, "rows": rows}, title, shown)


if __name__ == "__main__":
    main()
