"""Peak memory and time of the loss over a large vocabulary, in chunks of rows against all rows at once.

`python -m benchmarks.loss_memory [--quick]`. The last line is one JSON object; plain_peak_bytes and time_ratio are null where
the plain version was left out because it would not fit.
"""

import argparse
import json
import multiprocessing
import time

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.memory import peak_bytes, reset_peak
from learner.loss import ResponseTokens, loss_per_token
from video_opd.config import LearnerConfig, LossConfig
from video_opd.models.forward import by_chunks

VOCABULARY, HIDDEN = 151_936, 128  # a small hidden size: what is measured is the loss, not the head
CHUNK = LearnerConfig().logit_rows
PLAIN_COPIES = 4  # logits, log-softmax, their gradients


def peak_bytes_of(response_tokens: int, device: str, chunk: int) -> tuple[int, float]:
    """(bytes above what the inputs take, seconds) of one forward and backward pass of the sampled loss."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, device=device)
    hidden = torch.randn(response_tokens, HIDDEN, device=device, requires_grad=True)
    targets = torch.randint(VOCABULARY, (response_tokens,), device=device)
    actor, signal = (
        torch.full((response_tokens,), -12.0, device=device),
        torch.randn(response_tokens, device=device),
    )

    tokens = ResponseTokens(targets, actor, signal)

    def loss(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        return loss_per_token(LossConfig(), logits, tokens, rows)

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = reset_peak()
    started = time.perf_counter()
    by_chunks(head, hidden, loss, chunk, response_tokens)[0].sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_bytes()
    return peak - before, time.perf_counter() - started


def measure(response_tokens: int, device: str, chunk: int) -> tuple[int, float]:
    """In a process of its own, so that one measurement's memory is not another's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_bytes_of, (response_tokens, device, chunk))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="512 response tokens only")
    arguments = parser.parse_args()
    rows = []
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for tokens in (512,) if arguments.quick else (512, 4096, 16384):
            available = (
                torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
            )
            peak, seconds = measure(tokens, device, CHUNK)
            fits = PLAIN_COPIES * tokens * VOCABULARY * 4 < 0.9 * available
            plain_peak, plain_seconds = measure(tokens, device, tokens) if fits else (None, None)
            rows.append(
                {
                    "response_tokens": tokens,
                    "device": device,
                    "peak_bytes": peak,
                    "plain_peak_bytes": plain_peak,
                    "seconds": seconds,
                    "time_ratio": seconds / plain_seconds if plain_seconds else None,
                }
            )
    title = f"vocabulary {VOCABULARY:,}, hidden size {HIDDEN}, chunks of {CHUNK} rows"
    table = Table("device", "response tokens", "peak MiB", "plain peak MiB", "s", "time / plain", title=title)
    for row in rows:
        plain, ratio = row["plain_peak_bytes"], row["time_ratio"]
        known = (
            f"{plain / 2**20:.0f}" if plain else "does not fit",
            f"{row['seconds']:.1f}",
            f"{ratio:.2f}" if ratio else "-",
        )
        table.add_row(
            row["device"], f"{row['response_tokens']:,}", f"{row['peak_bytes'] / 2**20:.0f}", *known
        )
    Console().print(table)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
