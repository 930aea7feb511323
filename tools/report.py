"""`python -m tools.report OUT [OUT_B]`: writes OUT/report.html, a page to look at (docs/report.md)."""

import sys
import time

from infra.report import write_report


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if not 1 <= len(argv) <= 2 or argv[0].startswith("-"):
        print("usage: python -m tools.report OUT [OUT_B]", file=sys.stderr)
        return 2
    start = time.perf_counter()
    try:
        path = write_report(argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
