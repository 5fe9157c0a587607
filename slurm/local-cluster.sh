#!/usr/bin/env bash
# A real Slurm of two nodes (n1, n2) on this one machine: to try jobs out, and for the tests.
#
#   eval "$(slurm/local-cluster.sh start)"     starts it, or finds it running, and sets SLURM_CONF
#   sbatch --nodes 2 slurm/train.sh configs/stsb.yaml
#   sbatch --partition urgent --nodes 2 --exclusive --wrap 'sleep 30'    preempts it
#   slurm/local-cluster.sh status
#   slurm/local-cluster.sh stop
#
# A second argument names the folder of its state, by default ${TMPDIR:-/tmp}/trainer-slurm. Everything lives in there,
# the munge key and socket too, so that nothing under /etc or /run is touched and a real Slurm on this machine goes on
# undisturbed. Needs no systemd, no accounting, no cgroups, and not even root.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

start_timeout_s=60
stop_timeout_s=20
gpus_per_node=${TRAINER_SLURM_FAKE_GPUS:-0} # GPUs in name only: Slurm counts and hands them out, no device stands behind

fail() {
    echo "local-cluster: $*" >&2
    exit 1
}

# ---------------------------------------------------------------------------------------------------- daemons

# Whether process $1 is a living daemon of this folder; the words of a zombie are gone.
is_ours() {
    grep -aqF "$dir/" "/proc/$1/cmdline" 2>/dev/null
}

# The process id of a daemon; a stale pid file, or a foreign process with that id, does not count.
pid_of() {
    local pid
    pid=$(cat "$dir/$1.pid" 2>/dev/null) && is_ours "$pid" && echo "$pid"
}

daemons=(munged slurmctld slurmd.n1 slurmd.n2)

num_alive() {
    local name count=0
    for name in "${daemons[@]}"; do
        if pid_of "$name" >/dev/null; then count=$((count + 1)); fi
    done
    echo "$count"
}

nodes_idle() {
    [[ $(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | sort -u | wc -l) -eq 2 ]]
}

port_taken() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# Three free TCP ports in a row, below the range that the kernel uses for outgoing connections.
free_ports() {
    local port
    while port=$((20000 + RANDOM % 12000)); do
        port_taken "$port" || port_taken $((port + 1)) || port_taken $((port + 2)) || break
    done
    echo "$port $((port + 1)) $((port + 2))"
}

write_config() {
    local host memory_mb ports gres="" gres_types=""
    read -ra ports < <(free_ports)
    host=$(hostname -s)
    memory_mb=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    if ((gpus_per_node > 0)); then
        gres="Gres=gpu:$gpus_per_node" gres_types="GresTypes=gpu"
    fi
    # config_overrides: the nodes count as declared, however few processors the machine really has.
    cat >"$conf" <<CONF
ClusterName=trainer
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/slurmd.%n.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
$gres_types
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=2 RealMemory=$memory_mb $gres
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=2 RealMemory=$memory_mb $gres
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=local Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
CONF
    write_fake_gpus
}

write_fake_gpus() {
    local number
    : >"$dir/gres.conf"
    for ((number = 0; number < gpus_per_node; number++)); do
        : >"$dir/gpu$number" # Slurm wants one device file for each
        echo "Name=gpu File=$dir/gpu$number" >>"$dir/gres.conf"
    done
}

# ---------------------------------------------------------------------------------------------------- commands

start() {
    local missing=() command deadline
    for command in munged slurmctld slurmd sbatch srun sinfo; do
        command -v "$command" >/dev/null || missing+=("$command")
    done
    if ((${#missing[@]})); then
        fail "${missing[*]} not found; install Slurm: apt-get update && apt-get install -y --no-install-recommends" \
            "slurm-wlm slurmctld slurmd munge"
    fi
    if [[ $(num_alive) -eq 4 ]]; then
        echo "local-cluster: already running in $dir" >&2
    else
        stop
        echo "local-cluster: starting in $dir" >&2
        launch_daemons
    fi
    deadline=$((SECONDS + start_timeout_s))
    until nodes_idle || [[ -n $(squeue --noheader 2>/dev/null) ]]; do # nodes with jobs on them are up, too
        if ((SECONDS >= deadline)); then
            tail -n 5 "$dir"/*.log >&2
            fail "n1 and n2 are not idle after $start_timeout_s s; the logs are in $dir, their ends stand above"
        fi
        sleep 0.2
    done
    echo "export SLURM_CONF=$conf"
}

launch_daemons() {
    local node
    rm -rf "$dir"/state "$dir"/spool.* "$dir"/*.log "$dir"/munge.socket*
    mkdir -p "$dir"/state "$dir"/spool.n1 "$dir"/spool.n2
    write_config
    if [[ ! -s $dir/munge.key ]]; then
        (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    fi
    # A munged of our own, as the user who calls. --force: it would refuse a folder that other users cannot enter.
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" >>"$dir/start.log" 2>&1 </dev/null ||
        fail "munged did not start: $(tail -n 2 "$dir/munged.log")"
    slurmctld -c -f "$conf" >>"$dir/start.log" 2>&1 </dev/null || fail "slurmctld did not start; see $dir/start.log"
    for node in n1 n2; do
        slurmd -f "$conf" -N "$node" >>"$dir/start.log" 2>&1 </dev/null || fail "slurmd $node did not start; see $dir/start.log"
    done
}

stop() {
    local name pid deadline=$((SECONDS + stop_timeout_s)) stopped=()
    if pid_of slurmctld >/dev/null && pid_of munged >/dev/null; then
        end_jobs "$deadline"
    fi
    for name in slurmd.n1 slurmd.n2 slurmctld munged; do # munged last: the others speak through it until they end
        pid=$(pid_of "$name") || continue
        kill "$pid"
        while is_ours "$pid"; do
            if ((SECONDS >= deadline)); then kill -KILL "$pid" 2>/dev/null || true; fi
            sleep 0.05
        done
        stopped+=("$name")
    done
    kill_orphans
    if ((${#stopped[@]})); then echo "local-cluster: stopped ${stopped[*]}" >&2; fi
}

# Ends every job and waits for its processes: without slurmd nobody would.
end_jobs() {
    local jobs
    mapfile -t jobs < <(squeue --noheader --format=%A | sort -u)
    if ((${#jobs[@]} == 0)); then return; fi
    echo "local-cluster: ending jobs ${jobs[*]}" >&2
    scancel "${jobs[@]}" 2>/dev/null || true # TERM now, KILL after KillWait
    while [[ -n $(squeue --noheader --states=all --format=%T | grep -E 'RUNNING|COMPLETING|STOPPED' || true) ]]; do
        if ((SECONDS >= $1)); then break; fi
        sleep 0.2
    done
}

# Steps whose slurmd died before them go on alone: end the processes they started, then themselves.
kill_orphans() {
    local step task
    for step in $(pgrep -x slurmstepd || true); do
        [[ $(readlink "/proc/$step/cwd") == "$dir" ]] || continue # a step of another cluster
        for task in $(pgrep -P "$step" || true); do
            kill -KILL -- "-$task" 2>/dev/null || kill -KILL "$task" 2>/dev/null || true
        done
        kill -KILL "$step" 2>/dev/null || true
    done
}

status() {
    local name pid
    for name in "${daemons[@]}"; do
        pid=$(pid_of "$name") && echo "$name: pid $pid" || echo "$name: not running"
    done
    if [[ $(num_alive) -ne 4 ]]; then exit 3; fi
    sinfo --Node --long
    squeue
    echo "export SLURM_CONF=$conf"
}

usage="usage: slurm/local-cluster.sh start|stop|status [DIR]"
if [[ $# -lt 1 || $# -gt 2 ]]; then echo "$usage" >&2; exit 2; fi
dir=${2:-${TMPDIR:-/tmp}/trainer-slurm}
[[ $1 != start || -d $dir ]] || (umask 077 && mkdir -p "$dir")
[[ ! -e $dir || -O $dir ]] || fail "$dir belongs to $(stat -c %U "$dir"); name another folder: $0 $1 DIR"
dir=$(realpath "$dir")
if ((${#dir} > 80)); then fail "the path $dir is too long for a Unix socket (limit 80 characters here)"; fi
conf=$dir/slurm.conf
export SLURM_CONF=$conf
case $1 in
    start | stop | status) "$1" ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
