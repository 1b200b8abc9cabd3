"""The command line, ``esper``."""

import argparse
from types import ModuleType

import esper.demo as demo
import esper.forge_service as forge
import esper.nissa.watch as watch
import esper.tamiyo.commands as tamiyo
import esper.urabrask.commands as evaluate
import esper.urza.commands as audit
import esper.urza.service as service

# Each has add_arguments(parser) and main(options).
_COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "demo": (demo, "grow a narrow network on real data"),
    "watch": (watch, "show a run in the browser while it goes on"),
    "evaluate": (evaluate, "judge a kernel and show the report"),
    "audit": (audit, "check the audit log of a library"),
    "urza": (service, "look into a library, and serve it to other machines"),
    "forge": (forge, "compile and evaluate for a shared library"),
    "tamiyo": (tamiyo, "ask a controller, pause it, let it go on"),
}


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand; the entry point of the ``esper`` script."""
    parser = argparse.ArgumentParser(
        prog="esper", description="Networks that grow while they train."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, what_it_does) in _COMMANDS.items():
        command = commands.add_parser(name, help=what_it_does)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    options = parser.parse_args(argv)
    options.run(options)
