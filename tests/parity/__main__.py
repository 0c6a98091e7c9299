"""Measure every comparison of the ledger over many seeds, record it, and print the table of the README.

python -m tests.parity
"""

import json
from pathlib import Path

import torch

from tests.parity import everything
from tests.parity.ledger import row, table

RECORD = Path(__file__).parents[2] / "data" / "recorded" / "parity.json"
SEEDS = range(20)


def main() -> None:
    rows = [row(comparison, SEEDS) for comparison in everything().values()]
    record = {"seeds": len(SEEDS), "torch": torch.__version__, "rows": rows}
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
