"""The paper's findings on the toy, each by one command: `python -m tools.findings NAME` (docs/findings.md)."""
