#!/usr/bin/env bash
# One training run on a Slurm cluster. Nodes and devices come from Slurm: one task per GPU, or per node without GPUs.
#
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-gpu 8 slurm/train.sh configs/X.yaml [configs/hardware/Y.yaml] [--key value ...]
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-gpu 8 slurm/train.sh predict|mine --flag value ...
#
# Config files first, then overrides; relative paths start at the folder in which sbatch was called.
#   TRAINER_ENV           where Python lives: folder of a virtual environment, conda:NAME_OR_PATH, or a container image
#                         (*.sif: apptainer or singularity, *.sqsh: pyxis); default: the active environment, else .venv
#   TRAINER_PYTHON        python to run in there; default: python
#   TRAINER_SITE          sourced first, for modules and networks; default: slurm/site.sh (see slurm/site.example.sh)
#   TRAINER_PREFLIGHT     0 leaves out the checks that every node makes before the run
#   TRAINER_MAX_REQUEUES  how often one job goes back into the queue; default: 50
#
# 120 s before the time limit Slurm sends USR1. The program saves a checkpoint and leaves with 85, which asks this script
# to requeue the job. Where saving takes longer: sbatch --signal=USR1@300 ... (no "B:": the program must get the signal).
# So it does with 143, told to stop, when that was a preemption. Other exit codes: 0 done, 2 wrong command, config or node,
# 130 and 143 told to stop, anything else a failure.
# shellcheck disable=SC2317,SC2329  # finish and what it calls are reached by the trap
#SBATCH --job-name=trainer
#SBATCH --nodes=1
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
set -euo pipefail

refuse() {
    echo "train.sh: $*" >&2
    exit 2
}

usage="sbatch [--nodes N --gpus-per-node G ...] slurm/train.sh configs/X.yaml [configs/hardware/Y.yaml] [--key value ...]"
[[ -n ${SLURM_JOB_ID:-} ]] || refuse "submit it to Slurm: $usage"
cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this file from its spool folder, so $0 leads nowhere

# ------------------------------------------------------------------------------------------- what to run

command=fit
# predict and mine take no config, and go on by what they find in --out; directory prints that of a fit, for sweep.sh
if [[ ${1:-} == predict || ${1:-} == mine || ${1:-} == directory ]]; then
    command=$1
    shift
fi
configs=()
while [[ ${1:-} == *.yaml || ${1:-} == *.yml ]] && [[ $1 != --* ]]; do
    [[ -f $1 ]] || refuse "there is no config file $1 in $SLURM_SUBMIT_DIR"
    configs+=(--config "$1")
    shift
done
[[ $# -eq 0 || $1 == --* ]] || refuse "'$1' is neither a .yaml file nor a --key; usage: $usage"
[[ $command != fit || ${#configs[@]} -gt 0 || " $* " == *" --config"[\ =]* ]] || refuse "no config file given; usage: $usage"
arguments=("${configs[@]}" "$@")

# The values that the words give to a flag, a line each.
values_of() {
    local word previous=""
    for word in "${arguments[@]}"; do
        [[ $previous != "$1" ]] || echo "$word"
        [[ $word != "$1="* ]] || echo "${word#*=}"
        previous=$word
    done
}

# The run directory as the program has it: the flag, else the last config file that says it, else what directory_of_job
# finds.
directory_of_flag() {
    values_of --trainer.default_root_dir | tail -n 1 | from_home
}

directory_of_configs() {
    local file found="" said
    # quoted, or plain up to a comment or the end of a {...}; a blank may stand inside
    local word="[^\"',}[:space:]]" start="[^\"',}#[:space:]]"
    local in_yaml="s/^[^#]*default_root_dir: *(\"([^\"]*)\"|'([^']*)'|($start($word|[[:space:]]+$start)*)).*/\2\3\4/p"
    while read -r file; do
        said=$(sed -nE "$in_yaml" "$file" | tail -n 1) || true
        [[ ${said:-null} == null ]] || found=$said
    done < <(values_of --config)
    echo "$found" | from_home
}

# No shell expands the ~ of a file, or of --key=~/x.
from_home() {
    local folder
    IFS= read -r folder || true
    [[ $folder != \~ && $folder != \~/* ]] || folder=$HOME${folder:1}
    echo "$folder"
}

if [[ $command == directory ]]; then
    found=$(directory_of_flag)
    echo "${found:-$(directory_of_configs)}"
    exit
fi

# ------------------------------------------------------------------------------------------- where Python lives

site=${TRAINER_SITE:-slurm/site.sh}
[[ -f $site || -z ${TRAINER_SITE:-} ]] || refuse "TRAINER_SITE=$site is no file (looked from $PWD)"
run_in=()       # what a command is prefixed with
srun_options=() # of every step
set +eu         # neither a site's file nor conda is written for these
if [[ -f $site ]]; then
    # shellcheck source=/dev/null
    source "$site"
fi
environment=${TRAINER_ENV:-}
if [[ -z $environment${TRAINER_PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -f .venv/bin/activate ]]; then
    environment=.venv
fi
case $environment in
    "") ;;
    conda:*)
        eval "$("${CONDA_EXE:-conda}" shell.bash hook)"
        conda activate "${environment#conda:}" ||
            refuse "TRAINER_ENV=$environment can't be activated on $(hostname); is conda on the PATH (module load)?" ;;
    *.sif | *.sqsh)
        [[ -f $environment ]] || refuse "TRAINER_ENV=$environment: there is no such image (looked from $PWD)" ;;&
    *.sif)
        container=$(command -v apptainer || command -v singularity) ||
            refuse "TRAINER_ENV=$environment needs apptainer or singularity on $(hostname); neither is on the PATH"
        run_in=("$container" exec --nv --bind "$PWD" --pwd "$PWD" "$environment") ;;
    *.sqsh)
        srun_options+=(--container-image="$(realpath "$environment")" --container-mounts="$PWD:$PWD" --container-workdir="$PWD") ;;
    *)
        [[ -f $environment/bin/activate ]] ||
            refuse "TRAINER_ENV=$environment is no virtual environment, conda:NAME or image (looked from $PWD)"
        # shellcheck source=/dev/null
        source "$environment/bin/activate" ;;
esac
set -eu
python=${TRAINER_PYTHON:-python}
[[ $environment == *.sif || $environment == *.sqsh ]] || command -v "$python" >/dev/null ||
    refuse "there is no '$python' on $(hostname); set TRAINER_ENV or TRAINER_PYTHON"

# ------------------------------------------------------------------------------------------- how many of it

nodes=$SLURM_JOB_NUM_NODES
if [[ -z ${SLURMD_NODENAME:-} ]]; then # under salloc, beside the nodes: only a task knows the GPUs of its node
    # shellcheck disable=SC2016  # to be expanded in the task
    SLURM_GPUS_ON_NODE=$(srun --nodes=1 --ntasks=1 bash -c 'echo "${SLURM_GPUS_ON_NODE:-0}"')
fi
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > 0)); then
    if ((nodes > 1)) && [[ -n ${SLURM_GPUS:-} ]]; then
        refuse "--gpus=$SLURM_GPUS may fall unevenly on $nodes nodes; ask for --gpus-per-node"
    fi
    accelerator=gpu tasks=$gpus
else
    accelerator=cpu tasks=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-$nodes} / nodes))}
    if ((tasks * nodes != ${SLURM_NTASKS:-tasks * nodes})); then
        refuse "$SLURM_NTASKS tasks do not divide by $nodes nodes; ask for --ntasks-per-node"
    fi
fi

# The fewest CPUs that any node gave, shared among its tasks. Said to srun in so many words: it does not inherit
# --cpus-per-task (since 22.05), and would else bind each task, with its DataLoader workers, to one CPU.
cpus=$(tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
cpus_per_task=$((cpus < tasks ? 1 : cpus / tasks))
srun_options+=(--nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cpus_per_task")
if ((cpus < tasks)); then
    echo "train.sh: $tasks tasks share $cpus CPU on a node; ask for more, e.g. sbatch --cpus-per-gpu 8" >&2
    srun_options+=(--overcommit)
fi
if ((gpus > 0)); then srun_options+=(--gpu-bind=none); fi # each task sees all GPUs and takes that of its local rank
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_task}
export PYTHONUNBUFFERED=1

# Where the ranks meet: this script runs on the first node, so a port that is free here is free for rank 0. The
# address as Slurm itself uses it, since the name of a node need not be known to DNS.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first_node" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2 || true)
export MASTER_ADDR=${MASTER_ADDR:-$first_node}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 10000))
while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do
    MASTER_PORT=$((MASTER_PORT + 1))
done

# What Slurm decides stands behind the config files; what the user typed stands last and wins. The strategy is that of the
# files (ZeRO), else the program's for several ranks, which is ddp.
options=()
if [[ $command != fit ]]; then
    options+=(--accelerator "$accelerator" "$@") # the ranks are counted by the program
else
    options+=("${configs[@]}" --trainer.accelerator "$accelerator" --trainer.num_nodes "$nodes" --trainer.devices "$tasks" "$@")
fi

# ------------------------------------------------------------------------------------------- its run directory

directory_of_job() {
    compgen -G "runs/*/*job=$SLURM_JOB_ID" | head -n 1 || true
}

run_directory() {
    local found
    found=$(directory_of_flag)
    found=${found:-$(directory_of_configs)}
    found=${found:-$(directory_of_job)}
    if [[ -d $found ]]; then echo "$found"; fi
}

# A kill between two renames of the program leaves .step-N.replaced, which it reads as step-N.
last_checkpoint() {
    find "$1/checkpoints" -maxdepth 1 \( -name 'step-*' -o -name '.step-*.replaced' \) 2>/dev/null |
        sed 's|/\.\(step-[^/]*\)\.replaced$|/\1|' | sort -V | tail -n 1 || true
}

# ------------------------------------------------------------------------------------------- how it ends

requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} most=${TRAINER_MAX_REQUEUES:-50} job=$SLURM_JOB_ID
    if ((restarts >= most)); then
        echo "train.sh: not requeued: the job was restarted $restarts times, TRAINER_MAX_REQUEUES is $most"
        return 1
    fi
    # SECONDS: of this start; who trains for longer has a run directory that is not found here.
    if [[ $command == fit && -z $checkpoint ]] && ((restarts >= 3 && SECONDS < 600)); then
        echo "train.sh: not requeued: none of $((restarts + 1)) starts took a step"
        return 1
    fi
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    # Said before, for Slurm may end this script, and scontrol, with the job.
    echo "train.sh: requeueing job $job to go on from the checkpoint (restart $((restarts + 1)) of at most $most)"
    if scontrol requeue "$job" || (($? > 128)); then return 0; fi # in a trap, return alone would not be 0
    echo "train.sh: scontrol could not requeue job $job; the checkpoint is kept"
    return 1
}

# After the failure of a node, a preemption or a scontrol requeue by hand Slurm does it itself, and has counted it by now.
is_requeued() {
    local restarts
    restarts=$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null |
        sed -n "s/^JobId=$SLURM_JOB_ID .* Restarts=\([0-9]*\) .*/\1/p") || true
    ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0}))
}

# Where preemption has a grace time, Slurm ends the job by TERM, as scancel does, and does not requeue one that has left
# by the end of that time. The time of a preemption may be that of an earlier start.
is_preempted() {
    local start="" preempted=""
    read -r start preempted < <(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null |
        sed -n "s/^JobId=$SLURM_JOB_ID .* StartTime=\([^ ]*\) .* PreemptTime=\([0-9][^ ]*\) .*/\1 \2/p") || true
    [[ -n $preempted && ! $preempted < $start ]]
}

# The command with which somebody goes on. The config of the run directory is all of it, and holds no secrets.
say_how_to_go_on() {
    local script=$0 job place=(--nodes="$nodes" --ntasks-per-node="$tasks")
    if ((gpus > 0)); then place=(--nodes="$nodes" --gpus-per-node="$gpus"); fi
    job=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=//p') || true
    if [[ $job == */train.sh* ]]; then script=${job%%/train.sh*}/train.sh; fi # $0 is the copy in a spool folder
    printf 'train.sh: to go on: cd %q && sbatch' "$PWD"
    printf ' %q' "${place[@]}" --cpus-per-task="$cpus_per_task" "$script" "$1/config.yaml" --ckpt_path auto
    echo
}

exit_file=$PWD/.slurm-$SLURM_JOB_ID.exit # on the file system that all nodes share

finish() {
    local code=$? first="" folder checkpoint
    if [[ -s $exit_file ]]; then first="; the first to fail was $(cut -d ' ' -f 2- "$exit_file")"; fi
    rm -f "$exit_file"
    folder=$(run_directory)
    checkpoint=$(last_checkpoint "$folder")
    if [[ $code == 0 && -n $folder ]]; then echo "job $SLURM_JOB_ID, $(date -Is)" >"$folder/.done"; fi
    echo # a progress bar may have left its line open
    echo "train.sh: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST ended with exit code $code$first"
    [[ $command != fit ]] || echo "train.sh: run directory: ${folder:-none yet}; last checkpoint: ${checkpoint:-none}"
    if [[ $command == fit && $code == 85 && $checkpoint == "$checkpoint_before" ]]; then
        echo "train.sh: this start took no step; should that repeat, give it more time (sbatch --time): its limit is" \
            "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format=%l || true), USR1 comes 120 s before or as --signal says"
    fi
    if is_requeued; then
        echo "train.sh: Slurm has put job $SLURM_JOB_ID back into the queue itself: it goes on by itself, don't submit it again"
        return 0
    fi
    if [[ $code == 85 ]] || { [[ $code == 143 ]] && is_preempted; }; then
        if requeue; then return 0; fi
    fi
    if [[ $code != [02] && -n $checkpoint ]]; then say_how_to_go_on "$folder"; fi
}

# ------------------------------------------------------------------------------------------- run

echo "train.sh: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: nodes $nodes, tasks per node $tasks, CPUs per task" \
    "$cpus_per_task, $accelerator, meeting at $MASTER_ADDR:$MASTER_PORT, restarts ${SLURM_RESTART_COUNT:-0}"
echo "train.sh: to have it saved and requeued at once: scancel --signal=USR1 $SLURM_JOB_ID"

# A folder that was named, or that this job itself has made before: any other finished run is not what was asked for.
finished=$(directory_of_flag)
if [[ -z $finished ]] && ((${SLURM_RESTART_COUNT:-0} > 0)); then finished=$(directory_of_job); fi
if [[ -n $finished && -f $finished/.done ]]; then
    echo "train.sh: $finished holds a finished run ($(<"$finished/.done")): nothing to do;" \
        "to train it further remove $finished/.done"
    exit 0
fi

checkpoint_before=$(last_checkpoint "$(run_directory)")

# The ends of time limits and of jobs: this shell outlives what Slurm sends to the program.
trap : USR1 TERM INT
trap finish EXIT

export by_usr1=138 # status of a program that USR1 ended, before it could listen: nothing to save, and as good as 85

if [[ $command == fit && ${TRAINER_PREFLIGHT:-1} != 0 ]]; then
    # In the shape of the run itself, so that a task sees the devices it will get; the first one of each node speaks for it.
    # shellcheck disable=SC2016  # to be expanded in the task
    srun "${srun_options[@]}" --kill-on-bad-exit=0 bash -c '[[ $SLURM_LOCALID != 0 ]] || exec "$@"' preflight \
        "${run_in[@]}" "$python" -m trainer preflight "${options[@]}" || {
        [[ $? != "$by_usr1" ]] || exit 85
        refuse "the checks before the run failed: the lines above name node, check and remedy"
    }
fi

# Every task runs under this. Once one task has failed, srun ends the others and returns *their* code (143): so the
# first to fail leaves its own (noclobber: only the first can). 85 is agreed upon by all ranks, and rank 0, which has
# most to write, speaks for them. The traps keep this shell alive for the signals that Slurm sends to the program,
# which gets them all the same.
# shellcheck disable=SC2016  # to be expanded in the task
task='trap : USR1 USR2 TERM INT
"$@" || { code=$?
[[ $code != "$by_usr1" ]] || code=85
[[ $code != 85 || $SLURM_PROCID == 0 ]] || exit 0
(set -o noclobber; echo "$code rank $SLURM_PROCID on $SLURMD_NODENAME" >"$TRAINER_EXIT_FILE") 2>/dev/null
exit "$code"; }'

if ((nodes * tasks == 1)) && [[ -t 0 && -t 1 ]]; then srun_options+=(--pty); fi # a debugger can ask
rm -f "$exit_file"
code=0
TRAINER_EXIT_FILE=$exit_file srun "${srun_options[@]}" --kill-on-bad-exit=1 bash -c "$task" task \
    "${run_in[@]}" "$python" -m trainer "$command" "${options[@]}" || code=$?
if [[ -s $exit_file ]]; then code=$(cut -d ' ' -f 1 "$exit_file"); fi
exit "$code"
