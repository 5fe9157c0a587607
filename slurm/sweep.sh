#!/usr/bin/env bash
# One recipe several times, as a job array: for each seed, for each line of a file of overrides, or for both.
#
#   sbatch --array=0-2 slurm/sweep.sh configs/X.yaml [configs/hardware/Y.yaml] --seeds 1,2,3 [--key value ...]
#   sbatch --array=0-7%4 slurm/sweep.sh configs/X.yaml --overrides sweep.txt [--seeds 1,2] [--key value ...]
#
# A line of sweep.txt holds flags, quoted as in a shell: --model.learning_rate 2e-5 --data.batch_size 64
# Every task of the array is a job of its own, with all that slurm/train.sh does for one. Runs of one recipe share a
# group on W&B. Flags that stand behind the others hold for all runs.
#SBATCH --job-name=trainer
#SBATCH --nodes=1
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
set -euo pipefail

refuse() {
    echo "sweep.sh: $*" >&2
    exit 2
}

# Splits and unquotes a line as a shell does, but expands nothing; one word a line.
words_of() {
    xargs -r printf '%s\n' <<<"$1"
}

usage="sbatch --array=0-2 slurm/sweep.sh configs/X.yaml --seeds 1,2,3 (or --overrides FILE) [--key value ...]"
[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || refuse "submit it as a job array: $usage"
cd "$SLURM_SUBMIT_DIR"

configs=() seeds=("") lines=("") rest=()
while (($#)); do
    case $1 in
        --seeds | --overrides) [[ $# -ge 2 ]] || refuse "$1 needs a value; usage: $usage" ;;&
        --seeds) IFS=, read -ra seeds <<<"$2" && shift ;;
        --overrides)
            [[ -f $2 ]] || refuse "there is no file of overrides $2 in $PWD"
            mapfile -t lines < <(grep -vE '^[[:space:]]*(#|$)' "$2")
            ((${#lines[@]})) || refuse "$2 holds no line of overrides"
            for line in "${lines[@]}"; do # all of them in every task, before any of them trains
                words_of "$line" &>/dev/null || refuse "$2: a quote has no end in this line: $line"
            done
            shift ;;
        *.yaml | *.yml) if ((${#rest[@]})); then rest+=("$1"); else configs+=("$1"); fi ;;
        *) rest+=("$1") ;;
    esac
    shift
done
((${#configs[@]})) || refuse "no config file given; usage: $usage"

# sbatch runs a copy of this file from its spool folder: Slurm knows where the original and train.sh lie.
job=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
train=${job%%/sweep.sh*}/train.sh

num_runs=$((${#lines[@]} * ${#seeds[@]}))

# The second run in a folder would find the first one finished, and end as if it had trained.
declare -A taken=()
for line in "${lines[@]}"; do
    mapfile -t overrides < <(words_of "$line")
    folder=$("$train" directory "${configs[@]}" "${overrides[@]}" "${rest[@]}")
    place=$folder
    [[ -z $folder || $folder == *://* ]] || place=$(realpath -m -- "$folder") # ./runs/a is runs/a
    if [[ -n $folder && (${#seeds[@]} -gt 1 || -n ${taken[$place]:-}) ]]; then
        refuse "several of the $num_runs runs have trainer.default_root_dir $folder, which holds one:" \
            "leave it out, and each gets a folder of its own"
    fi
    [[ -z $folder ]] || taken[$place]=1
done

task=$SLURM_ARRAY_TASK_ID
((task < num_runs)) ||
    refuse "task $task of the array has no run: there are $num_runs (${#lines[@]} x ${#seeds[@]}); --array=0-$((num_runs - 1))"
if ((task == SLURM_ARRAY_TASK_MAX && SLURM_ARRAY_TASK_COUNT < num_runs)); then # 0-6:2 and 1,3 leave some out, too
    echo "sweep.sh: $((num_runs - SLURM_ARRAY_TASK_COUNT)) of $num_runs runs have no task in this array;" \
        "all of them: --array=0-$((num_runs - 1))" >&2
fi
line=${lines[task / ${#seeds[@]}]} seed=${seeds[task % ${#seeds[@]}]}
mapfile -t overrides < <(words_of "$line")
if [[ -n $seed ]]; then overrides+=(--seed_everything "$seed"); fi

recipe=$(basename "${configs[0]}")
exec "$train" "${configs[@]}" --tracking.group "${recipe%.y*ml}" "${overrides[@]}" "${rest[@]}"
