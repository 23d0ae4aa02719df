#!/usr/bin/env bash
# Trains everything that is embedded in the package and puts it there. Resumable: run it again.
# On one core with AMX: rewards 22 + 9 + 9 + 14 min, preference 20 min, classifier 6 min; VAE and generator take hours
# on a CPU (train_generator.py also takes --device cuda). Set OMP_NUM_THREADS=1 if the machine
# does other work too: two threads beside a busy process are several times slower than one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
out=build
assets=src/customized_grpo/assets

$python scripts/train_rewards.py --kind dino --seed 1 --width 128 --steps 1800 --out $out/reward-dino
$python scripts/train_rewards.py --kind clip --seed 2 --width 128 --out $out/reward-clip
$python scripts/train_preference.py --init $out/reward-clip/model --out $out/reward-preference
$python scripts/train_rewards.py --kind clip --seed 3 --width 96 --strength 1.3 --out $out/evaluator-clip
$python scripts/train_rewards.py --kind dino --seed 4 --width 96 --strength 1.3 --steps 1600 \
  --out $out/evaluator-dino
$python scripts/train_classifier.py --out $out/evaluator-attributes
$python scripts/train_vae.py --out $out/vae
$python scripts/train_generator.py --vae $out/vae/vae --out $out/obedient
# A base that copies, loses the subject or misses an attribute now and then, as real ones do.
$python scripts/train_generator.py --vae $out/vae/vae --init $out/obedient/pipeline \
  --copy 0.2 --lost 0.15 --missed 0.15 --steps 600 --out $out/generator

rm -rf $assets
mkdir -p $assets
cp -r $out/generator/pipeline $assets/generator
for name in reward-clip reward-preference reward-dino \
  evaluator-clip evaluator-dino evaluator-attributes; do
  cp -r $out/$name/model $assets/$name
done
