"""The teacher service: a pool of replicas that score trajectories and predict answers."""

import video_opd  # noqa: F401  # first: makes transformers importable
