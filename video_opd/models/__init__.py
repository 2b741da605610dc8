"""Models: prompts, forward passes, model folders, the vLLM engine."""
