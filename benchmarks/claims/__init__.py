"""The paper's claims on the demo whose start lacks skills (demo/gaps.py): runs, curves, tables, verdicts."""
