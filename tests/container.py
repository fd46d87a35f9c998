"""What a container gives a process, made by a mount namespace where that is allowed."""

import shutil
import subprocess


def in_shared_memory_of(size: str) -> list[str]:
    """Return the words before a command that give it a `/dev/shm` of its own, such as the "64m" of `docker run`."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def may_mount() -> bool:
    """Return whether this process may make a mount namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*in_shared_memory_of("64m"), "true"], capture_output=True).returncode == 0
