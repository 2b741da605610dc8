"""What a teacher sends per response token, and its cost: log-probs, top-K, hidden states or logits.

`python -m benchmarks.teacher_payload [--quick]`: a language-model head of Qwen3-VL's vocabulary on random
hidden states. `score s`: the teacher's work after the last layer. `trip s`: the object store's put and get.
`learner s`: what the learner computes to recover the teacher's log-probs. The last line is one JSON object.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.command import Row, make_parser, print_result, timed
from teacher_service.engine import top_k_of
from video_opd.models.forward import token_logprobs
from video_opd.types import TopK

VOCABULARY, HIDDEN, TOKENS, REPEATS = 151_936, 2048, 512, 3
TOP_K = (1, 8, 32, 64, 256, 1024)


def median_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """(median seconds of REPEATS calls after a warm-up, the last result)."""
    runs = [timed(work) for _ in range(1 + REPEATS)][1:]
    return float(np.median([seconds for seconds, _ in runs])), runs[-1][1]


def measure(tokens: int) -> list[Row]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = torch.randn(VOCABULARY, HIDDEN, device=device) / HIDDEN**0.5
    hidden = 3 * torch.randn(tokens, HIDDEN, device=device)
    targets = torch.randint(VOCABULARY, (tokens,), device=device)

    def log_softmax(states: np.ndarray, project: bool) -> torch.Tensor:
        arrived = torch.from_numpy(states.copy()).to(device)
        return (arrived.matmul(head.T) if project else arrived).log_softmax(-1).cpu()

    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any] | None]] = {
        "log-probs": (lambda: token_logprobs(hidden.matmul(head.T), targets).cpu().numpy(), None),
        **{f"top-{k}": (lambda k=k: top_k_of(hidden.matmul(head.T), k), None) for k in TOP_K},
        "hidden states": (lambda: hidden.cpu().numpy(), partial(log_softmax, project=True)),
        "logits": (lambda: hidden.matmul(head.T).cpu().numpy(), partial(log_softmax, project=False)),
    }
    rows = []
    for name, (score, restore) in ways.items():
        score_s, payload = median_s(score)
        trip_s, arrived = median_s(lambda payload=payload: ray.get(ray.put(payload)))
        learner_s = median_s(partial(restore, arrived))[0] if restore else 0.0
        arrays = (payload.ids, payload.logprobs) if isinstance(payload, TopK) else (payload,)
        size = sum(array.nbytes for array in arrays) / tokens
        seconds = {"score_s": score_s, "trip_s": trip_s, "learner_s": learner_s}
        rows.append({"sends": name, "bytes_per_token": size} | seconds)
    return rows


def main() -> None:
    quick = make_parser("teacher_payload", __doc__, "64 response tokens").parse_args().quick
    tokens = 64 if quick else TOKENS
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    rows = measure(tokens)
    ray.shutdown()
    print_result({"tokens": tokens, "rows": rows}, f"{tokens} tokens, V = {VOCABULARY:,}, H = {HIDDEN}", rows)


if __name__ == "__main__":
    main()
