"""The `piadm` command, which needs the extra `cli`."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from piadm.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "matplotlib", "jinja2"):
            raise
        sys.exit(f"piadm: the command needs {error.name}: pip install 'piadm[cli]'")
    app()


if __name__ == "__main__":
    main()
