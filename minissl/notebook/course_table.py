"""Print the course's table of results: the metrics that every chapter shows, of the methods so far."""

import json
import statistics
from pathlib import Path

COURSE_METRICS = {  # key in the scoreboard -> column of the table
    "knn": "k-NN, object",
    "linear": "object",
    "linear_color": "color",
    "linear_action": "action",
    "linear_place": "place",
    "J&F": "J&F of clips",
}


def course_table(board: Path, rows: int) -> str:
    """Format the first rows of a scoreboard: mean and standard deviation (n - 1) over seeds, in %.

    Args:
        board: scoreboard.json; {"rows": {name: {seed: metrics}}}, metrics in [0, 1], two seeds or more per row.
        rows: number of rows.

    Returns:
        A table of one line per row.
    """
    lines = [" " * 12 + "".join(f"{name:>14}" for name in COURSE_METRICS.values())]
    for name, seeds in list(json.loads(board.read_text(encoding="utf-8"))["rows"].items())[:rows]:
        percentages = [[100 * metrics[key] for metrics in seeds.values()] for key in COURSE_METRICS]
        cells = (f"{statistics.mean(x):.1f} ± {statistics.stdev(x):4.1f}" for x in percentages)
        lines.append(f"{name:12}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
