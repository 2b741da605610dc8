"""Rollout actors: vLLM engines that sample from the current student."""

import video_opd  # noqa: F401  # first: makes transformers importable
