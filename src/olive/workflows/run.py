"""``python -m olive.workflows.run --config FILE``: the command of Olive 0.5, the same as ``olive run``."""

from __future__ import annotations

import sys

from olive.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry(["run", *sys.argv[1:]]))
