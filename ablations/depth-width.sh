#!/usr/bin/env bash
# Depth or width? Pre-training of ResNets with 1 to 6 blocks in a stage, of half, full and double width.
#
#     ablations/depth-width.sh --data-dir /data/dqn_replay
#     python finetune_bc.py --game pong --checkpoint runs/atc_2222_0.5/checkpoint.pt --blocks 2 2 2 2 \
#         --width-multiplier 0.5 --method atc_2222_0.5 ...
#
# All flags go to $SCRIPT, by default pretrain_atc.py.
set -euo pipefail
script=${SCRIPT:-pretrain_atc.py}
method=${script#pretrain_}
for blocks in "1 1 1 1" "2 2 2 2" "3 4 6 3"; do
  for width in 0.5 1 2; do
    # shellcheck disable=SC2086 # the blocks are four arguments
    python "$script" --blocks $blocks --width-multiplier $width --run-name "${method%.py}_${blocks// /}_$width" "$@"
  done
done
