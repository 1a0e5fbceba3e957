"""Print the runs of several reports of the digits examples in one table.

python examples/digits_table.py runs/demo/torch runs/demo/tensorflow
"""

import sys
from pathlib import Path

from digits_common import print_table, read_report

if __name__ == "__main__":
    reports = [read_report(Path(folder)) for folder in sys.argv[1:]]
    print_table([run for runs, _ in reports for run in runs], max(size for _, size in reports))
