"""Measure every comparison over 20 seeds, record the differences, and print them as a table.

python -m tests.parity            measure and record
python -m tests.parity --print    print the recorded table
"""

import argparse
import json
from pathlib import Path

import torch

from tests.parity import load_comparisons
from tests.parity.ledger import markdown_table, measure

RECORD = Path(__file__).parents[2] / "data" / "recorded" / "parity.json"
SEEDS = range(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the recorded table and measure nothing")
    if parser.parse_args().print:
        print(markdown_table(json.loads(RECORD.read_text(encoding="utf-8"))["rows"]))
        return
    rows = [measure(entry, SEEDS) for entry in load_comparisons().values()]
    record = {"seeds": len(SEEDS), "torch": torch.__version__, "rows": rows}
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
