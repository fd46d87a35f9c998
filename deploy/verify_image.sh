#!/usr/bin/env bash
# Build the CPU image for real, without Docker, and try it.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: deploy/verify_image.sh [options]

Builds the Dockerfile's cpu target with buildah and tries the image, confined as Docker confines it: readiness, user, key,
an answer, metrics, a mounted checkpoint, and a clean stop in the middle of an answer. Needs root, Debian's buildah and
debootstrap, some 25 GB of disk, port 8000, and the virtual environment of `make test` for the openai client.

  --base IMAGE       base image instead of a Debian made by debootstrap, for example docker.io/library/python:3.11-slim-bookworm
  --torch-index URL  index of PyTorch's CPU wheels
  --work DIR         where images are kept while it runs (a new folder in ${TMPDIR:-/tmp}); removed in the end
  --keep             leave DIR: a second run with --work DIR builds from its layers
HELP
}

here=$(cd "$(dirname "$0")/.." && pwd)
base='' index='' work='' keep=false
while [ $# -gt 0 ]; do
    case $1 in
        --base) base=$2; shift 2 ;;
        --torch-index) index=$2; shift 2 ;;
        --work) work=$2; shift 2 ;;
        --keep) keep=true; shift ;;
        -h|--help) usage; exit 0 ;;
        *) echo "verify_image.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
done
[ "$(id -u)" = 0 ] || { echo "verify_image.sh: needs root" >&2; exit 2; }
for program in buildah debootstrap; do
    command -v $program > /dev/null || { echo "verify_image.sh: apt-get install $program" >&2; exit 2; }
done
python=$here/.venv/bin/python
[ -x "$python" ] || { echo "verify_image.sh: run 'make test' first: it makes .venv" >&2; exit 2; }

work=${work:-$(mktemp -d)}
mkdir -p "$work"
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
storage() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }
server=''
clean() {
    if [ -n "$server" ]; then pkill -KILL -s "$server" || true; fi
    storage rm --all > /dev/null 2>&1 || true
    [ -z "${group:-}" ] || rmdir "$group" 2> /dev/null || true
    if ! $keep; then storage rmi --all --force > /dev/null 2>&1 || true; rm -rf "$work"; fi
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A base like the default one: Debian with Python.
if [ -z "$base" ]; then
    base=localhost/debian-python
    if ! storage inspect --type image $base > /dev/null 2>&1; then
        echo "a Debian with Python, by debootstrap ..."
        debootstrap --variant=minbase --include=ca-certificates,python3,python3-dev,python3-venv bookworm "$work/rootfs" > "$work/debootstrap.log"
        container=$(storage from scratch)
        storage add --quiet "$container" "$work/rootfs" / > /dev/null
        storage commit --quiet --format docker "$container" $base > /dev/null
        storage rm "$container" > /dev/null
        rm -rf "$work/rootfs"
    fi
fi

# pip's own settings of this machine, with every file and folder that they name, for the build alone.
settings=$("$python" -m pip config list | sed -n "s/^[^.]*\.\([a-z-]*\)='\(.*\)'\$/\1 = \2/p" | sort -u -t= -k1,1)
printf '[global]\n%s\n' "$settings" > "$work/pip.conf"
volumes=(--volume "$work/pip.conf:/etc/pip.conf:ro")
for path in $(echo "$settings" | grep -o '/[^ ]*' | sed 's,^//*,/,; s,/simple$,,' | sort -u); do  # an index links to its files
    [ -e "$path" ] && volumes+=(--volume "$path:$path:ro")
done

echo "the image ..."
started=$SECONDS
storage build --format docker --layers --target cpu --tag melt-serve "${volumes[@]}" \
    --build-arg PYTHON_IMAGE="$base" ${index:+--build-arg TORCH_CPU_INDEX="$index"} "$here" > "$work/build.log" 2>&1 \
    || { tail -30 "$work/build.log"; echo "FAILED: the build" >&2; exit 1; }
echo "ok: it is built, in $((SECONDS - started)) s"

# Facts of the image, as words of a command line: Entrypoint, Healthcheck, StopSignal.
storage inspect --type image melt-serve > "$work/image.json"
config() {
    "$python" - "$1" "$work/image.json" <<'PYTHON'
import json, shlex, sys
value = json.load(open(sys.argv[2]))["Docker"]["config"][sys.argv[1]]
value = value["Test"][1:] if isinstance(value, dict) else value
print(shlex.join([value] if isinstance(value, str) else value))
PYTHON
}
eval "entrypoint=($(config Entrypoint))"
[ "$(config StopSignal)" = SIGTERM ] || { echo "FAILED: its stop signal is $(config StopSignal)" >&2; exit 1; }

# What Docker gives and takes: 64 MiB of shared memory, a limit of memory, calls for NUMA policies that fail; and with
# --read-only --tmpfs /tmp --cap-drop ALL no capabilities, and nothing to write to but /tmp. (A root that is read-only as a
# whole lets buildah 1.28 crash in the end; its user may write to these two folders, /tmp and /run/lock only.)
capabilities=(AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE SETFCAP SETGID SETPCAP SETUID SYS_CHROOT)
limit=$((5 << 30))
for group in /sys/fs/cgroup/memory/melt-serve /sys/fs/cgroup/melt-serve; do  # the first and the second version of cgroups
    { [ -d "$(dirname $group)" ] && mkdir -p $group; } 2> /dev/null || continue
    if echo $limit 2> /dev/null > $group/memory.limit_in_bytes || echo $limit 2> /dev/null > $group/memory.max; then break; fi
    rmdir $group
done
[ -d $group ] || { echo "note: memory is not limited, as this machine does not let cgroups be made"; group=''; }
in_docker() {
    exec setsid unshare --mount sh -c '
        [ -z "$1" ] || echo $$ > "$1/cgroup.procs"
        mount -t tmpfs -o size=64m tmpfs /dev/shm
        shift
        exec "$@"' sh "$group" "$python" "$here/deploy/confine.py" "$@"
}

# Runs the image's own entry point as its own user, with the host's network, and checks it.
try() {
    echo "$1:"; shift
    container=$(storage from melt-serve)
    root=$(storage mount "$container")
    mkdir -p "$work/tmp" && chmod 1777 "$work/tmp"
    in_docker buildah --root "$work/storage" --runroot "$work/run" run --env VLLM_API_KEY=sesame \
        "${capabilities[@]/#/--cap-drop=CAP_}" \
        --volume "$root/home:/home:ro" --volume "$root/var/tmp:/var/tmp:ro" --volume "$work/tmp:/tmp" \
        --volume "$here/melt_serve/checkpoints/melt-demo:/models/x:ro" "$container" -- \
        "${entrypoint[@]}" --kv-cache-memory-bytes 268435456 "$@" > "$work/server.log" 2>&1 &
    server=$!
    if ! "$python" "$here/deploy/check_server.py" http://127.0.0.1:8000 --key sesame --model "${model:-melt-demo}" --pid $server \
        --healthcheck "buildah --root $work/storage --runroot $work/run run $container -- $(config Healthcheck)"; then
        tail -20 "$work/server.log"
        exit 1
    fi
    if wait $server; then echo "ok: its exit code is 0"; else echo "FAILED: its exit code is $?" >&2; exit 1; fi
    server=''
    storage rm "$container" > /dev/null
}
try "the bundled checkpoint"
model=/models/x try "a mounted checkpoint" --model /models/x --enforce-eager --reasoning-parser qwen3
echo "the image does what it should"
