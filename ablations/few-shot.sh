#!/usr/bin/env bash
# How many demonstrations does fine-tuning need? Behaviour cloning on 500, 5,000 and 50,000 transitions.
#
#     ablations/few-shot.sh --checkpoint runs/pretrain_atc__0/checkpoint.pt --game pong --data-dir /data/dqn_replay
#
# All flags go to finetune_bc.py. METHOD, by default atc, begins the methods' names in the results.
set -euo pipefail
for transitions in 500 5000 50000; do
  python finetune_bc.py --num-transitions $transitions --method "${METHOD:-atc}_$transitions" "$@"
done
