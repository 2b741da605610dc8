"""Reports of a run, and `python -m evaluation`: scores of any model under named protocols."""
