# What is true of one cluster and of no other. Copy it to slurm/site.sh (which git ignores) and uncomment what you need;
# slurm/train.sh sources it on the first node, in the folder of sbatch, and all tasks inherit what it exports.
# shellcheck shell=bash

# Where software comes as modules: without this, nodes have no conda or apptainer, or an old driver library.
# module purge && module load cuda/12.8 apptainer

# Where Python lives, if not in .venv: a virtual environment, conda:NAME_OR_PATH, or a container image (.sif, .sqsh).
# export TRAINER_ENV=conda:trainer

# Nodes with several networks: "connection refused" or a hang at the start means that ranks meet on the wrong one.
# The interface of `ip -brief address` that reaches the other nodes; gloo (CPU ranks) and NCCL (GPUs) each have their own.
# export GLOO_SOCKET_IFNAME=eno1
# export NCCL_SOCKET_IFNAME=ib0

# InfiniBand: needed where NCCL_DEBUG=INFO shows NET/Socket although there are cards, or takes a card that leads
# elsewhere (storage); names are those of `ibstat`, = means exactly these.
# export NCCL_IB_HCA="=mlx5_0,mlx5_1"

# RoCE (RDMA over Ethernet): the index of the GID that `show_gids` lists as v2; a wrong one times out in the first step.
# export NCCL_IB_GID_INDEX=3

# No RDMA at all, or a broken one: slow but sure. Good for finding out whether the network is at fault.
# export NCCL_IB_DISABLE=1

# Says which network NCCL takes, once per rank; to find out why several nodes are slow or hang.
# export NCCL_DEBUG=INFO

# Nodes that reach the internet only through a proxy: without it, model hub and W&B time out.
# export HTTPS_PROXY=http://proxy.example.org:3128 NO_PROXY=localhost,127.0.0.1,.cluster

# Nodes without any internet: `trainer prepare` on a login node first; these keep libraries from waiting for an answer.
# export HF_HUB_OFFLINE=1 WANDB_MODE=offline

# A home folder that is small or slow: caches on the parallel file system, the same for login and compute nodes.
# export HF_HOME=/scratch/$USER/huggingface TRAINER_CACHE=/scratch/$USER/siamese-trainer
