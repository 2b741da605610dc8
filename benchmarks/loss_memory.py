"""Peak memory and time of the loss over a large vocabulary: in chunks of rows, or all rows at once ("plain").

`python -m benchmarks.loss_memory [--quick]`. The last line is one JSON object. Its plain_peak_bytes and
time_ratio are null where plain would not fit in memory.
"""

import time

import psutil
import torch

from benchmarks.command import Row, in_new_process, make_parser, print_result
from benchmarks.memory import peak_bytes, reset_peak
from learner.loss import ResponseTokens, loss_per_token
from video_opd.config_learner import LearnerConfig, LossConfig
from video_opd.models.forward import by_chunks

VOCABULARY, HIDDEN = 151_936, 128  # the hidden size is small: what is measured is the loss, not the head
CHUNK = LearnerConfig().logit_rows
PLAIN_COPIES = 4  # logits, log-softmax, their gradients


def measure(num_tokens: int, device: str, chunk: int) -> tuple[int, float]:
    """(peak bytes above the inputs, seconds), forward and backward. Run it in a new process."""
    on_gpu = device == "cuda"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, device=device)
    hidden = torch.randn(num_tokens, HIDDEN, device=device, requires_grad=True)
    targets = torch.randint(VOCABULARY, (num_tokens,), device=device)
    actor_logprobs = torch.full((num_tokens,), -12.0, device=device)
    tokens = ResponseTokens(targets, actor_logprobs, torch.randn(num_tokens, device=device))

    def loss(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        return loss_per_token(LossConfig(), logits, tokens, rows)

    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else reset_peak()
    started = time.perf_counter()
    by_chunks(head, hidden, loss, chunk, num_tokens)[0].sum().backward()
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()
    return peak - before, time.perf_counter() - started


def compare(num_tokens: int, device: str) -> Row:
    """One row: in chunks, and plain where that fits."""
    available = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    fits = PLAIN_COPIES * num_tokens * VOCABULARY * 4 < 0.9 * available
    peak, seconds = in_new_process(measure, num_tokens, device, CHUNK)
    plain_peak, plain_s = in_new_process(measure, num_tokens, device, num_tokens) if fits else (None, None)
    peaks = {"peak_bytes": peak, "plain_peak_bytes": plain_peak}
    times = {"seconds": seconds, "time_ratio": seconds / plain_s if plain_s else None}
    return {"response_tokens": num_tokens, "device": device} | peaks | times


def main() -> None:
    parser = make_parser("loss_memory", __doc__, "512 response tokens only")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="default: all that are here")
    asked = parser.parse_args()
    devices = asked.devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    rows = [compare(n, device) for device in devices for n in ((512,) if asked.quick else (512, 4096, 16384))]
    title = f"vocabulary {VOCABULARY:,}, hidden size {HIDDEN}, chunks of {CHUNK} rows"
    print_result({"rows": rows}, title, rows)


if __name__ == "__main__":
    main()
