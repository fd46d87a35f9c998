"""vLLM's `vllm serve`, under a supervisor: `python -m melt_serve.api.server [flags]`.

Its `vllm` command does not start with the CPU build, and its module `vllm.entrypoints.openai.api_server` ignores
`--api-server-count`.
"""

import os
import sys

from melt_serve.engine import lifeline


def main() -> None:
    """Run vLLM's server until it is told to stop."""
    lifeline.hold("vLLM's server")
    # After that: it takes long.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command does
    args = make_arg_parser(FlexibleArgumentParser("melt-serve serve")).parse_args()
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    ServeSubcommand.cmd(args)
    # The interpreter's own end takes seconds, in which libraries complain of each other's leaks.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
