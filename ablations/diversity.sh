#!/usr/bin/env bash
# Do more games help if the number of frames stays? Pre-training on 5, 10, 25 and 50 games, 10 million frames each time.
#
#     ablations/diversity.sh --data-dir /data/dqn_replay
#     python finetune_bc.py --game pong --checkpoint runs/atc_5_games/checkpoint.pt --method atc_5_games ...
#
# All flags go to $SCRIPT, by default pretrain_atc.py. With 5 games it reads 100,000 rows of each replay checkpoint.
set -euo pipefail
games=(breakout amidar battle_zone freeway qbert air_raid asteroids atlantis bank_heist berzerk bowling boxing carnival
  centipede chopper_command crazy_climber demon_attack double_dunk elevator_action enduro fishing_derby frostbite gopher
  gravitar hero ice_hockey jamesbond kangaroo krull kung_fu_master montezuma_revenge ms_pacman name_this_game phoenix
  pitfall private_eye road_runner robotank skiing solaris space_invaders star_gunner tennis time_pilot tutankham
  up_n_down video_pinball wizard_of_wor yars_revenge zaxxon)
script=${SCRIPT:-pretrain_atc.py}
method=${script#pretrain_}
for number in 5 10 25 50; do
  python "$script" --games "${games[@]:0:number}" --rows-per-checkpoint $((500000 / number)) \
    --run-name "${method%.py}_${number}_games" "$@"
done
