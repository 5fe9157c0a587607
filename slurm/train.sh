#!/usr/bin/env bash
# One training run on a Slurm cluster. Nodes and devices come from Slurm: one task per GPU, or per node without GPUs.
#
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-gpu 8 slurm/train.sh configs/X.yaml [configs/hardware/Y.yaml] [--key value ...]
#
# Config files first, then overrides; relative paths start at the folder in which sbatch was called.
#   TRAINER_VENV    virtual environment to activate; default: the active one, else .venv in that folder
#   TRAINER_PYTHON  python to run; default: python
# shellcheck disable=SC2317,SC2329  # run_directory and finish are reached by the trap
#SBATCH --job-name=trainer
#SBATCH --nodes=1
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
set -euo pipefail

refuse() {
    echo "train.sh: $*" >&2
    exit 2
}

usage="sbatch [--nodes N --gpus-per-node G ...] slurm/train.sh configs/X.yaml [configs/hardware/Y.yaml] [--key value ...]"
[[ -n ${SLURM_JOB_ID:-} ]] || refuse "submit it to Slurm: $usage"
cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this file from its spool folder, so $0 leads nowhere

# ------------------------------------------------------------------------------------------- what to run

configs=()
while [[ ${1:-} == *.yaml || ${1:-} == *.yml ]] && [[ $1 != --* ]]; do
    [[ -f $1 ]] || refuse "there is no config file $1 in $SLURM_SUBMIT_DIR"
    configs+=(--config "$1")
    shift
done
[[ $# -eq 0 || $1 == --* ]] || refuse "'$1' is neither a .yaml file nor a --key; usage: $usage"
[[ ${#configs[@]} -gt 0 || " $* " == *" --config"[\ =]* ]] || refuse "no config file given; usage: $usage"

if [[ -z ${TRAINER_VENV:-}${TRAINER_PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -f .venv/bin/activate ]]; then
    TRAINER_VENV=.venv
fi
if [[ -n ${TRAINER_VENV:-} ]]; then
    [[ -f $TRAINER_VENV/bin/activate ]] || refuse "TRAINER_VENV=$TRAINER_VENV is no virtual environment (looked from $PWD)"
    # shellcheck disable=SC1091
    source "$TRAINER_VENV/bin/activate"
fi
python=${TRAINER_PYTHON:-python}
command -v "$python" >/dev/null || refuse "there is no '$python' on $(hostname); set TRAINER_VENV or TRAINER_PYTHON"

# ------------------------------------------------------------------------------------------- how many of it

nodes=$SLURM_JOB_NUM_NODES
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
srun_options=(--cpus-per-task="$cpus_per_task")
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

# The strategy stands before the config files, for they may know better (DeepSpeed); what Slurm decides stands after
# them; what the user typed stands last and wins.
command=("$python" -m trainer fit)
if ((nodes * tasks > 1)); then command+=(--trainer.strategy ddp); fi
command+=("${configs[@]}" --trainer.accelerator "$accelerator" --trainer.num_nodes "$nodes" --trainer.devices "$tasks" "$@")

# ------------------------------------------------------------------------------------------- run

# As the program decides it: the flag, else the last config file that says it, else a name that holds the job id.
run_directory() {
    local found="" word previous="" file
    for word in "${command[@]}"; do
        case $previous in
            --config)
                file=$(sed -n 's/^[^#]*default_root_dir: *["'\'']\{0,1\}\([^"'\'',} ]*\).*/\1/p' "$word" | tail -n 1)
                found=${file:-$found} ;;
            --trainer.default_root_dir) found=$word ;;
        esac
        previous=$word
        [[ $word != --trainer.default_root_dir=* ]] || found=${word#*=}
    done
    if [[ -z $found ]]; then found=$(compgen -G "runs/*/*job=$SLURM_JOB_ID" | head -n 1 || true); fi
    if [[ -d $found ]]; then echo "$found"; else echo "none yet"; fi
}

exit_file=$PWD/.slurm-$SLURM_JOB_ID.exit # on the file system that all nodes share

finish() {
    local code=$?
    rm -f "$exit_file"
    echo # a progress bar may have left its line open
    echo "train.sh: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST ended with exit code $code; run directory: $(run_directory)"
}
trap finish EXIT

# Every task runs under this. Once one task has failed, srun ends the others and returns *their* code (143): so the
# first to fail leaves its own (noclobber: only the first can). The traps keep this shell alive for the signals that
# Slurm sends to the program, which gets them all the same.
# shellcheck disable=SC2016  # to be expanded in the task
task='trap : USR1 USR2 TERM INT
"$@" || { code=$?; (set -o noclobber; echo "$code" >"$TRAINER_EXIT_FILE") 2>/dev/null; exit "$code"; }'

echo "train.sh: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: nodes $nodes, tasks per node $tasks, CPUs per task" \
    "$cpus_per_task, $accelerator, meeting at $MASTER_ADDR:$MASTER_PORT"
echo "train.sh: ${command[*]}"
rm -f "$exit_file"
code=0
TRAINER_EXIT_FILE=$exit_file srun --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" \
    "${srun_options[@]}" --kill-on-bad-exit=1 bash -c "$task" task "${command[@]}" || code=$?
if [[ -s $exit_file ]]; then code=$(<"$exit_file"); fi
exit "$code"
