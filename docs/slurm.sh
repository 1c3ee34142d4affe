#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00
#SBATCH --requeue --signal=B:USR1@300
: "${OUT:?set OUT to the output folder: OUT=/runs/mae_l16 sbatch slurm.sh}"
trap 'kill -TERM "$run"; wait "$run"; scontrol requeue "$SLURM_JOB_ID"' USR1 TERM
# Seconds to save in. Releases of torchrun before 2026 lack this variable and allow 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=$([ -f "$OUT/config.toml" ] && echo --resume)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m mimref refine --arch vit_l16 --source mae --data /data/imagenet --out "$OUT" $resume &
run=$!
wait "$run"
