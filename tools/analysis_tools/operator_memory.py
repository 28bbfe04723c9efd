"""Peak memory of softmax-free attention, forward and backward, against tokens and landmarks.

    python tools/analysis_tools/operator_memory.py

Each case runs in a fresh process and reports how far its peak resident memory rises above the
idle process that already holds the arguments. `[N, m]` is what one kernel matrix per head would
take. CPU, float32, 2 heads of 32 channels.
"""

import resource
import subprocess
import sys

from tabulate import tabulate

HEADS, HEAD_DIMS = 2, 32
TOKENS = (16800, 33600, 67200)
LANDMARKS = (64, 256, 1024)


def measure(tokens: int, landmarks: int) -> float:
    """Peak MiB above the idle process."""
    import torch

    from mmsoft.ops import softmax_free_attention

    def run(n: int, m: int) -> int:
        q, v, points = (torch.randn(1, HEADS, k, HEAD_DIMS, requires_grad=True) for k in (n, n, m))
        idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out = softmax_free_attention(q, v, 0.3 * points, solver="direct")
        out.backward(torch.ones_like(out))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle

    run(64, 8)  # libraries and threads
    return run(tokens, landmarks) / 1024


def main() -> None:
    """Print the table."""
    if len(sys.argv) == 3:
        print(measure(int(sys.argv[1]), int(sys.argv[2])))
        return
    rows = []
    for landmarks in LANDMARKS:
        for tokens in TOKENS:
            command = [sys.executable, __file__, str(tokens), str(landmarks)]
            peak = float(subprocess.run(command, check=True, capture_output=True).stdout)
            matrix = HEADS * tokens * landmarks * 4 / 2**20
            rows.append([tokens, landmarks, peak, matrix, peak * 2**20 / tokens])
    header = ["tokens", "landmarks", "peak MiB", "[N, m] MiB", "bytes per token"]
    print(tabulate(rows, header, "plain", floatfmt=".0f"))


if __name__ == "__main__":
    main()
