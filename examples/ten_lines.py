"""The smallest useful program: settings that outlive it. Counts its own runs.

python examples/ten_lines.py [LOG]
"""

import sys

import foldlog

with foldlog.open(sys.argv[1] if len(sys.argv) > 1 else "settings.log") as settings:
    runs = settings.get("runs")
    settings.put("runs", b"%d" % (int(runs.value) + 1 if runs else 1))
    print("run", settings.get("runs").value.decode())
