"""``python -m aquifer status``: what the agent of this node says about itself."""

import argparse
import json
import sys

from .errors import AquiferError
from .wire import default_socket_path, request_status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m aquifer", description="Talk to the Aquifer agent of this node.")
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="print the node's state as JSON")
    status.add_argument("--socket", default=None, help=f"the agent's socket (default: {default_socket_path()})")
    options = parser.parse_args()
    try:
        print(json.dumps(request_status(options.socket), indent=2))
    except (AquiferError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
