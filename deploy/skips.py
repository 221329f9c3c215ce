"""Reads pytest's JUnit reports of a run and prints the totals and every skip with its reason."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def main(folder: Path) -> None:
    passed = failed = 0
    skipped: Counter[str] = Counter()
    for report in sorted(folder.glob("*.xml")):
        for case in ElementTree.parse(report).iter("testcase"):
            skip = case.find("skipped")
            if skip is not None:
                skipped[f"{report.stem}: {skip.get('message') or 'no reason given'}"] += 1
            elif case.find("failure") is not None or case.find("error") is not None:
                failed += 1
            else:
                passed += 1
    print("\n== skipped ==")
    for reason, count in sorted(skipped.items()):
        print(f"{count:4d}  {reason}")
    if not skipped:
        print("nothing")
    print(f"\n{passed} passed, {failed} failed, {skipped.total()} skipped")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
