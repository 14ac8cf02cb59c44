"""``python -m olive``."""

import sys

from olive.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
