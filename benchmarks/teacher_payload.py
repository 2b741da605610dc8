"""What a teacher sends for each response token, and what that costs: log-probs, top-K, hidden states or logits.

`python -m benchmarks.teacher_payload [--quick]`. A language-model head of Qwen3-VL's vocabulary on random hidden states:
`score s` is the teacher's work behind the last layer, `trip s` the object store's put and get, `learner s` what the learner
must compute to have the teacher's log-probs again. The last line is one JSON object.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table

from teacher_service.engine import top_k_of
from video_opd.models.forward import token_logprobs
from video_opd.types import TopK

VOCABULARY, HIDDEN, TOKENS, REPEATS = 151_936, 2048, 512, 3
TOP_K = (1, 8, 32, 64, 256, 1024)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """(median of REPEATS after one to warm up, the last result)."""
    result, times = work(), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - started)
    return float(np.median(times)), result


def num_bytes(payload: Any) -> int:
    return payload.ids.nbytes + payload.logprobs.nbytes if isinstance(payload, TopK) else payload.nbytes


def measure(tokens: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = torch.randn(VOCABULARY, HIDDEN, device=device) / HIDDEN**0.5
    hidden = 3 * torch.randn(tokens, HIDDEN, device=device)
    targets = torch.randint(VOCABULARY, (tokens,), device=device)

    def head_again(states: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(states.copy()).to(device).matmul(head.T).log_softmax(-1).cpu()

    def softmax_again(logits: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(logits.copy()).to(device).log_softmax(-1).cpu()

    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any] | None]] = {
        "log-probs": (lambda: token_logprobs(hidden.matmul(head.T), targets).cpu().numpy(), None),
        **{f"top-{k}": (lambda k=k: top_k_of(hidden.matmul(head.T), k), None) for k in TOP_K},
        "hidden states": (lambda: hidden.cpu().numpy(), head_again),
        "logits": (lambda: hidden.matmul(head.T).cpu().numpy(), softmax_again),
    }
    rows = []
    for name, (score, restore) in ways.items():
        score_s, payload = seconds(score)
        trip_s, arrived = seconds(lambda payload=payload: ray.get(ray.put(payload)))
        learner_s = seconds(lambda restore=restore, arrived=arrived: restore(arrived))[0] if restore else 0.0
        each = num_bytes(payload) / tokens
        rows.append(
            {
                "sends": name,
                "bytes_per_token": each,
                "score_s": score_s,
                "trip_s": trip_s,
                "learner_s": learner_s,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher_payload", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 response tokens")
    tokens = 64 if parser.parse_args().quick else TOKENS
    torch.set_num_threads(1)
    ray.init(
        address="local", num_cpus=1, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
    )
    rows = measure(tokens)
    ray.shutdown()
    table = Table(
        "sends",
        "bytes a token",
        "score s",
        "trip s",
        "learner s",
        title=f"{tokens} tokens, V = {VOCABULARY:,}, H = {HIDDEN}",
    )
    for row in rows:
        times = (f"{row[c]:.4f}" for c in ("score_s", "trip_s", "learner_s"))
        table.add_row(row["sends"], f"{row['bytes_per_token']:,.0f}", *times)
    Console().print(table)
    print(json.dumps({"tokens": tokens, "rows": rows}))


if __name__ == "__main__":
    main()
