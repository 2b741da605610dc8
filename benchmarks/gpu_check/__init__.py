"""Whether this machine's GPU computes, publishes and remembers as the project expects: `make gpu-check`."""

import video_opd  # noqa: F401  # first: makes transformers importable
