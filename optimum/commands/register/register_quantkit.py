"""`optimum-cli quantkit ...`: every command of `quantkit`, with the same arguments.

optimum-cli imports the files of the namespace `optimum.commands.register` and adds what they list. Nothing heavy is imported
before the command runs.
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

__all__ = ["REGISTER_COMMANDS"]


class QuantkitCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(
        name="quantkit", help="Quantize Mixture-of-Experts models to INT4 or FP8, convert, run and measure them."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.epilog = "For what a command takes: optimum-cli quantkit COMMAND --help"
        parser.add_argument("command", nargs="?", help="quantize, convert, eval, generate, inspect, verify or bench")
        parser.add_argument("arguments", nargs=REMAINDER, help="as for quantkit itself")

    def run(self) -> None:
        from quantkit.cli import main

        given = [self.args.command] if self.args.command else []
        main([*given, *self.args.arguments], prog_name="optimum-cli quantkit")


REGISTER_COMMANDS = [QuantkitCommand]
