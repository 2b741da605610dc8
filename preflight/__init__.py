"""Everything that is known before a run starts: inputs, memory, machines."""

import video_opd  # noqa: F401  # first: makes transformers importable
