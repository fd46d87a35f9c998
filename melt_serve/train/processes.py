"""A run on several processes of this machine, by torchrun's own launcher, which ends as one process does.

`torchrun` itself answers Ctrl-C, a session whose minutes are over, and any error with a traceback and exit code 1.
"""

import logging
import os
from collections.abc import Sequence

PATIENCE = 24 * 3600


def launched() -> bool:
    """Whether this process is one of several that torchrun, or `launch`, started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(words: Sequence[str], processes: int) -> int:
    """Run `python -m melt_serve.train WORDS` on several processes; return the exit code that one would have."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.CRITICAL)  # of the launcher: the first process speaks for all
    try:
        # It ends all others so many seconds after one has ended: the first may have a state to write.
        patience = f"--shutdown-timeout={PATIENCE}"
        run(parse_args(["--standalone", patience, f"--nproc-per-node={processes}", "-m", "melt_serve.train", *words]))
    except SignalException as ended:
        return 128 + ended.sigval
    except ChildFailedError as failed:
        codes = [failure.exitcode for failure in failed.failures.values()]
        return next((code for code in codes if code > 0), 128 - codes[0])
    return 0
