"""The curriculum: which prompts are sampled, and why."""
