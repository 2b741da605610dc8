"""One script for each claim of the README."""
