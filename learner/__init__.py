"""The learner: DeepSpeed ranks as Ray actors that update the student and publish its weights."""

import video_opd  # noqa: F401  # first: makes transformers importable
