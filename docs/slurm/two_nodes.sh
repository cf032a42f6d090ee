#!/usr/bin/env bash
# Fine-tune Llama 3 70B on two nodes of eight GPUs: sbatch docs/slurm/two_nodes.sh
#SBATCH --job-name=mytune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mytune-%j.log
set -euo pipefail

# The folders must be the same on all nodes: output_dir and checkpoint_dir on a shared file system.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# TERM, five minutes before the time is up, lets the run finish its step and save (exit code 75).
# The job is then requeued, and resume_from_checkpoint goes on where it stopped.
rc=0
srun tune run \
  --nnodes "$SLURM_NNODES" \
  --nproc_per_node 8 \
  --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d \
  --rdzv_endpoint "$head:29500" \
  full_finetune_distributed --config llama3/70B_full \
  data_parallel_replicate_dim=1 \
  enable_async_checkpointing=True save_every_n_steps=200 \
  resume_from_checkpoint=True || rc=$?

# #SBATCH --requeue is for nodes that fail: SLURM does not requeue a job that ended by itself.
if [ "$rc" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$rc"
