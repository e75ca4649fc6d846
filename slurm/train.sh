#!/usr/bin/env bash
#SBATCH --job-name=distrib
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1         # 0 on a partition without GPUs
#SBATCH --ntasks-per-node=1       # ranks of a node: as many as GPUs
#SBATCH --cpus-per-task=2         # BLAS threads of a rank
#SBATCH --time=2:00:00
#SBATCH --signal=B:USR1@120       # seconds before the time limit in which to stop, save and requeue
#SBATCH --requeue
#SBATCH --open-mode=append        # one log over all requeues
#SBATCH --output=slurm-%j.log
#
# Trains on every GPU of the job, one rank each, or with --gpus-per-node=0 one rank per task:
#
#   sbatch slurm/train.sh --seed 1                                        options of python -m distrib.train
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 slurm/train.sh
#
# Options of sbatch stand before the script's name and win over the lines above; what follows the name goes to the
# program and wins over RECIPE. A job that meets its time limit saves, is requeued and goes on; the tasks of an array
# train with the seeds of their numbers. More in slurm/README.md.
# From the environment:
#   PYTHON     which Python; else .venv of the repository, else python3
#   LAUNCHER   pmix (srun --mpi=pmix, for Open MPI), pmi2 (for MPICH and its kin) or, always with --elastic, mpirun (Open MPI's)
#   LAUNCHER_OPTIONS   more options for srun or mpirun
#   RUN_DIR    the run's folder, else --run-dir, else runs/slurm-JOB
#   STALLS     how many starts in a row may end without a new step before the job is given up: 3

RECIPE=(--recipe fast99 --batch-size-per-rank 64)

# What srun and mpirun say when they lose a node, or cannot start ranks on one: no fault of the run's
NODE_LOST='Node failure on|launch failed|lost communication|Unable to contact slurmd|Timed out waiting for job step'

set -uo pipefail
say() { echo "train.sh: $*" >&2; }
[ -n "${SLURM_JOB_ID:-}" ] || { say "start me with sbatch: sbatch slurm/train.sh"; exit 2; }
stopping='' cancelled='' child=''
trap 'stopping=yes' USR1    # before the time limit
trap 'cancelled=yes' TERM   # scancel, preemption: Slurm tells the ranks too

# --- the run's folder, the log, the program -----------------------------------------------------------------------

job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
run_dir=${RUN_DIR:-runs/slurm-$job}
previous='' elastic=''
for argument in "$@"; do
    case $argument in
        --recipe | --recipe=* | --batch-size | --batch-size=* | --batch-size-per-rank | --batch-size-per-rank=*)
            defaults=off ;;
        --run-dir=*) run_dir=${argument#*=} ;;
        --elastic) elastic=on ;;
        --no-elastic) elastic='' ;;
    esac
    [ "$previous" != --run-dir ] || run_dir=$argument
    previous=$argument
done
case ${defaults:-on}" $*" in
    on*) ;;
    *" --recipe"*) RECIPE=() ;; # a recipe brings its own batch
    *) RECIPE=("${RECIPE[@]:0:2}") ;;
esac
case $run_dir in # of --run-dir=~/a the shell leaves ~ as it is
    '~' | '~/'*) run_dir=$HOME${run_dir#\~} ;;
    '~'*) say "--run-dir $run_dir: give the whole path"; exit 2 ;;
esac
seed=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    seed=(--seed "$SLURM_ARRAY_TASK_ID")
    [ "$run_dir" = "runs/slurm-$job" ] || run_dir=$run_dir/$SLURM_ARRAY_TASK_ID
fi
mkdir -p "$run_dir" || { say "$run_dir: cannot be made: give another --run-dir"; exit 2; }

about=$(scontrol show job "$SLURM_JOB_ID")
field() { sed -n "s/^ *$1=\(.*\)/\1/p" <<<"$about" | head -n 1; }
log=$(field StdOut)
[ ! -f "$log" ] || ln -sfn "$log" "$run_dir/slurm-$job.log"
earlier=$(wc -l 2>/dev/null <"$log")

script=$(field Command) # with its options; Slurm runs a copy of it, which lies elsewhere
while [ ! -f "$script" ] && [ "$script" != "${script% *}" ]; do script=${script% *}; done
repository=$(dirname "$(dirname "$script")")
[ -f "$repository/distrib/train.py" ] || repository=$PWD
[ ! -f "$repository/distrib/train.py" ] || export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ ! -x "$repository/.venv/bin/python" ] || python=$repository/.venv/bin/python
fi
command -v "$python" >/dev/null || { say "no $python on ${SLURMD_NODENAME:-this node}: set PYTHON"; exit 2; }

# --- ranks --------------------------------------------------------------------------------------------------------

gpus=${SLURM_GPUS_ON_NODE:-0}
cpus=${SLURM_CPUS_PER_TASK:-1}
if [ "$gpus" -gt 0 ]; then
    per_node=$gpus
    ranks=$((gpus * SLURM_NNODES))
else
    per_node=${SLURM_NTASKS_PER_NODE:-}
    ranks=${SLURM_NTASKS:-$((${per_node:-1} * SLURM_NNODES))}
fi
share=$((SLURM_CPUS_ON_NODE / ${per_node:-1}))
if [ "$share" -lt "$cpus" ]; then
    cpus=$((share > 1 ? share : 1))
    say "note: $SLURM_CPUS_ON_NODE CPUs for $per_node ranks on a node: give --ntasks-per-node=$per_node to sbatch"
fi
export OMP_NUM_THREADS=$cpus OPENBLAS_NUM_THREADS=$cpus MKL_NUM_THREADS=$cpus PYTHONUNBUFFERED=1
export TERM=dumb TTY_COMPATIBLE=0 # mpirun gives ranks a terminal: no progress bars into the log

# Around each rank: USR1 must not end one that does not listen yet (stop() repeats it), TERM is the rank's own affair, and
# one that is killed cannot say so. It is said in the first failure.json, by a shell that starts nothing: the launcher
# is about to kill the others, and this shell too.
accuse='accuse() { # RANK HOST SIGNAL: in failure.json, unless there is one
    local word pid=0 step=0
    printf -v word "%s/ranks/%05d.json" "$run_dir" "$1"
    [ ! -f "$word" ] || word=$(<"$word")
    [[ ! $word =~ \"pid\":\ ([0-9]+) ]] || pid=${BASH_REMATCH[1]}
    [[ ! $word =~ \"step\":\ ([0-9]+) ]] || step=${BASH_REMATCH[1]}
    set -C
    { printf "{\"rank\": %d, \"host\": \"%s\", \"pid\": %d, \"step\": %d, \"cause\": \"killed by signal %d\", \"time\": %s}\n" \
        "$1" "$2" "$pid" "$step" "$3" "${EPOCHREALTIME/,/.}" >"$run_dir/failure.json"; } 2>/dev/null
    set +C
}'
eval "$accuse"
around=$accuse'
trap "" USR1
trap "told=yes" TERM INT
run_dir=$1 told=
shift
"$@"
code=$?
if [ "$code" -gt 128 ] && [ -z "$told" ]; then
    read -r host </proc/sys/kernel/hostname
    accuse "${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-$SLURM_PROCID}}}" "$host" "$((code - 128))"
fi
exit "$code"'
if [ -n "$elastic" ]; then # the launcher must see itself how a rank ends; the others write down who died
    around='trap "" USR1
shift
exec "$@"'
fi
rank=(bash -c "$around" rank "$run_dir" "$python" -m distrib.train
    ${RECIPE[@]+"${RECIPE[@]}"} ${seed[@]+"${seed[@]}"} "$@" --run-dir "$run_dir")
read -ra more <<<"${LAUNCHER_OPTIONS:-}"
launcher=${LAUNCHER:-pmix}
[ -z "$elastic" ] || launcher=mpirun
if [ "$launcher" = mpirun ]; then
    mpirun=$(dirname "$(command -v "$python")")/mpirun
    [ -x "$mpirun" ] || mpirun=mpirun
    command -v "$mpirun" >/dev/null ||
        { say "LAUNCHER=mpirun${elastic:+, as --elastic needs it}, but no mpirun on PATH"; exit 2; }
    launch=("$mpirun" -n "$ranks" --map-by "ppr:${per_node:-1}:node:oversubscribe" --bind-to none)
    [ -z "$elastic" ] || launch+=(--with-ft ulfm)
else
    types=$(srun --mpi=list 2>&1)
    grep -qw "$launcher" <<<"$types" || { say "srun has no --mpi=$launcher: set LAUNCHER to mpirun or to one of" \
        "$(grep -v '[.:]' <<<"$types" | tr -s '[:space:]' ' ')"; exit 2; }
    # Without --gpu-bind a rank sees all of the job's GPUs on its node, which NCCL needs for its fastest ways, and takes
    # its own by local rank; bound to one, it takes that. (--gpu-bind=none would show it those of other jobs, too.)
    # A lost rank ends the step at once under PMIx, else 10 s later; ranks that stop together have as long.
    launch=(srun "--mpi=$launcher" --export=ALL --ntasks="$ranks" --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait=10)
    [ -z "$per_node" ] || launch+=(--ntasks-per-node="$per_node")
    [ "$((${per_node:-1} * cpus))" -le "$SLURM_CPUS_ON_NODE" ] || launch+=(--overcommit)
fi

# --- restarts without progress ------------------------------------------------------------------------------------

newest_step() {
    local steps
    steps=$(find "$run_dir/checkpoints" -name 'step-*.safetensors' ! -name '*.state.safetensors' 2>/dev/null |
        sed 's/.*step-0*\([0-9][0-9]*\)\.safetensors/\1/' | sort -n | tail -n 1)
    echo "${steps:-0}"
}

stalls_left() { # counts a restart against the step at which the last start began; false if there were too many
    local step began stalls
    step=$(newest_step)
    read -r began stalls <"$run_dir/restarts" || return 0
    [ "$step" -le "$began" ] || stalls=-1
    [ "$((stalls + 1))" -lt "${STALLS:-3}" ] || { say "job $job: given up: $((stalls + 1)) starts ended without a step" \
        "beyond $step; once the cause is gone, sbatch it again with --run-dir $run_dir"; return 1; }
    [ "${1:-}" != count ] || echo "$step $((stalls + 1))" >"$run_dir/restarts"
}

if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    echo "$(newest_step) 0" >"$run_dir/restarts"
else # Slurm itself requeues a job whose node failed
    say "job $job: restart $SLURM_RESTART_COUNT, from step $(newest_step)"
    stalls_left count || exit 1
fi

# --- run, stop, requeue -------------------------------------------------------------------------------------------

stop() {
    say "job $job: USR1: stopping with a checkpoint"
    stopping=yes
    trap '' USR1
    while kill -USR1 "$child" 2>/dev/null; do sleep 2; done &
}
rm -rf "$run_dir/ranks" # of an earlier start, as the failure; the ranks that --elastic survived are kept
failure=$run_dir/failure.json
if [ -n "$elastic" ] && grep -qs '"survived"' "$failure"; then
    sed -i '0,/^  "survived"/ { /^{/ b; /^  "survived"/ b; d }' "$failure"
else
    rm -f "$failure"
fi
result() { cksum "$run_dir/summary.json" 2>/dev/null; }
earlier_result=$(result)
"${launch[@]}" ${more[@]+"${more[@]}"} "${rank[@]}" &
child=$!
trap stop USR1
[ -z "$stopping" ] || stop
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends a wait, too
wait "$child"
code=$?

said() { tail -n "+$((${earlier:-0} + 1))" "$log" 2>/dev/null | grep -aE "$1"; } # in this start
last=$(said '^distrib: ' | tail -n 1)
lost=''
case $code in
    0) # launchers say so, too, when they have lost a node, or after a stop
        case " $* " in *" --help "*) exit 0 ;; esac
        code=1
        if [ "$(result)" != "$earlier_result" ]; then
            [ -n "$stopping$cancelled" ] && ! grep -qs '"finished": true' "$run_dir/summary.json" || exit 0
            [ -n "$cancelled" ] || code=85
        elif [ -z "$cancelled" ]; then
            lost='the launcher ended without a result of the run'
        fi ;;
    2)
        if [[ $last == *" holds a finished run: "* ]]; then
            say "job $job: $run_dir holds a finished run: nothing to do"
            exit 0
        fi ;;
    138) [ -z "$stopping" ] || code=85 ;; # the launcher itself was not up yet
esac
[ -n "$cancelled" ] || [ -n "$lost" ] || [ "$code" = 2 ] || lost=$(said "$NODE_LOST" | tr -d '\000' | tail -n 1)
if [ -z "$cancelled" ] && { [ "$code" = 85 ] || [ -n "$lost" ]; }; then
    [ -z "$lost" ] || say "job $job: a node or a launch was lost: $lost"
    stalls_left || exit 1
    say "job $job: stopped at step $(newest_step), requeued"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    say "job $job: cannot be requeued: sbatch it again with --run-dir $run_dir to go on"
elif [ -n "$cancelled" ]; then
    at=$(newest_step)
    [ "$at" = 0 ] && at='before a checkpoint' || at="at step $at: sbatch it again with --run-dir $run_dir to go on"
    say "job $job: cancelled, stopped $at"
else
    verdict=''
    # The shell around a killed rank may be killed before it can speak: srun still names first the rank that ended first.
    first=$(said '^srun: error: [^:]+: tasks? [0-9]' | head -n 1)
    [[ ! $first =~ error:\ ([^:]+):\ task\ ([0-9]+):\ Killed ]] || accuse "${BASH_REMATCH[2]}" "${BASH_REMATCH[1]}" 9
    [ "$code" = 2 ] || verdict=$("$python" -m launch.cli verdict --ended "$run_dir" 2>/dev/null)
    case $verdict in
        *" failed at step "*) ;;
        *) verdict=$last ;;
    esac
    if [ -z "$verdict" ] && [ ! -d "$run_dir/ranks" ] && [ "$launcher" = pmix ]; then
        verdict='no rank started; MPICH and its kin need LAUNCHER=pmi2 (slurm/README.md)'
    fi
    say "job $job: failed with exit code $code${verdict:+: ${verdict#distrib: }}"
fi
exit "$code"
