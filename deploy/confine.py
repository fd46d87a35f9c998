"""Run a command as Docker's default seccomp profile confines it: calls for NUMA policies answer EPERM.

    deploy/confine.py COMMAND [ARGUMENT ...]

For `deploy/verify_image.sh`, which runs the image without Docker. x86-64 Linux only.
"""

import ctypes
import os
import struct
import sys

FORBIDDEN = {"mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239}
"""System calls that the profile allows with CAP_SYS_NICE only, by their numbers."""

# From linux/prctl.h, linux/seccomp.h and linux/bpf_common.h.
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ANSWER_EPERM = 0x7FFF0000, 0x00050001


class Program(ctypes.Structure):
    """A `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def confine() -> None:
    """Confine this process and what it becomes.

    Raises:
        OSError: the kernel does not take the filter.
    """
    calls = list(FORBIDDEN.values())
    code = [(LOAD_WORD, 0, 0, 0)]  # the call's number
    code += [(JUMP_IF_EQUAL, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    code += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ANSWER_EPERM)]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
    program = Program(len(code), ctypes.cast(instructions, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the kernel does not take the seccomp filter")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    confine()
    os.execvp(sys.argv[1], sys.argv[1:])
