#!/bin/bash
# Data-parallel training over two hosts, with one torchrun on each: corral submit ddp.sh
#CORRAL --name ddp --hosts 2 --gpus-per-host 4
#CORRAL --max 12h --preemptible --grace 2m --on-preempt SIGUSR1 --requeue

# All hosts run this script, and all of them start, or none.
exec torchrun \
    --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node 4 \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    train_ddp.py
