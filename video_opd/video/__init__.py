"""Videos: which frames, decoded where, kept for how long."""
