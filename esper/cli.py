"""The command line, ``esper``: demo, audit, evaluate, forge, tamiyo, urza, watch."""

import argparse

import esper.demo as demo
import esper.forge_service as forge
import esper.nissa.watch as watch
import esper.tamiyo.commands as tamiyo
import esper.urabrask.commands as evaluate
import esper.urza.commands as audit
import esper.urza.service as service


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand; the entry point of the ``esper`` script."""
    parser = argparse.ArgumentParser(
        prog="esper", description="Networks that grow while they train."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo_parser = commands.add_parser("demo", help="grow a narrow network on real data")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.main)
    audit_parser = commands.add_parser("audit", help="check the audit log of a library")
    audit.add_arguments(audit_parser)
    audit_parser.set_defaults(run=audit.main)
    forge_parser = commands.add_parser("forge", help="compile and evaluate for a shared library")
    forge.add_arguments(forge_parser)
    forge_parser.set_defaults(run=forge.main)
    urza_parser = commands.add_parser("urza", help="serve a library to other machines")
    service.add_arguments(urza_parser)
    urza_parser.set_defaults(run=service.main)
    evaluate_parser = commands.add_parser("evaluate", help="judge a kernel and show the report")
    evaluate.add_arguments(evaluate_parser)
    evaluate_parser.set_defaults(run=evaluate.main)
    watch_parser = commands.add_parser("watch", help="show a run in the browser while it goes on")
    watch.add_arguments(watch_parser)
    watch_parser.set_defaults(run=watch.main)
    tamiyo_parser = commands.add_parser("tamiyo", help="ask a controller, pause it, let it go on")
    tamiyo.add_arguments(tamiyo_parser)
    tamiyo_parser.set_defaults(run=tamiyo.main)
    options = parser.parse_args(argv)
    options.run(options)
