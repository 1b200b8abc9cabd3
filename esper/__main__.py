"""``python -m esper`` is the ``esper`` command."""

from esper.cli import main

main()
