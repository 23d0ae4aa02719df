#!/usr/bin/env bash
# Trains everything that is embedded in the package and puts it there. Resumable: run it again.
#   DEVICE=cuda WORKERS=12 scripts/train_embedded.sh
# On one core with AMX: rewards 22 + 9 + 9 + 14 min, classifier 6 min; the preference 60 min on one
# without. On an H200 with 16 cores: VAE and generator 5.5 min each, side by side, the flawed stage
# 34 s; on a CPU they take a day. Set OMP_NUM_THREADS=1 if the machine does other work too: two
# threads beside a busy process are several times slower than one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
out=build
assets=src/customized_grpo/assets
where="--device ${DEVICE:-cpu} --workers ${WORKERS:-0}"

$python scripts/train_rewards.py --kind dino --seed 1 --width 128 --steps 2900 --out $out/reward-dino
$python scripts/train_rewards.py --kind clip --seed 2 --width 128 --out $out/reward-clip
$python scripts/train_preference.py --init $out/reward-clip/model --steps 7000 --out $out/reward-preference
$python scripts/train_rewards.py --kind clip --seed 3 --width 96 --strength 1.3 --out $out/evaluator-clip
$python scripts/train_rewards.py --kind dino --seed 4 --width 96 --strength 1.3 --steps 1600 \
  --out $out/evaluator-dino
$python scripts/train_classifier.py --out $out/evaluator-attributes
$python scripts/train_vae.py --batch 128 --steps 9000 $where --out $out/vae
$python scripts/train_generator.py --batch 512 --steps 3273 --lr 1e-3 $where --vae $out/vae/vae \
  --out $out/obedient
# A base that copies, loses the subject or misses an attribute now and then, as real ones do.
$python scripts/train_generator.py --batch 512 --steps 300 --lr 5e-4 $where --vae $out/vae/vae \
  --init $out/obedient/pipeline --copy 0.2 --lost 0.15 --missed 0.15 --out $out/generator

put() {  # FOLDER NAME
  rm -rf "$assets/$2"
  cp -r "$1" "$assets/$2"
}
put $out/generator/pipeline generator
for name in reward-clip reward-preference reward-dino \
  evaluator-clip evaluator-dino evaluator-attributes; do
  put $out/$name/model $name
done
