"""The embedded default: synthetic grounding clips as real mp4 files, and a tiny teacher and student that read them."""
