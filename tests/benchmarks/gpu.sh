#!/usr/bin/env bash
# Every figure of docs/speed.md that takes a GPU, in about ten minutes on a large one:
#
#   tests/benchmarks/gpu.sh kvasir-seg.zip results/gpu
#   DEVICE=cpu QUICK=1 tests/benchmarks/gpu.sh kvasir-seg.zip results/try    # only shows that it runs
#
# 1. images/s, samples/s and memory of all networks, as written and at our settings (speed.md, speed.json)
# 2. a training of kseg-fast on Kvasir-SEG: seconds to its validation Dice (run/metrics.jsonl)
# 3. its Dice in float32, in bf16 and compiled; they should differ by 0.001 at most (dice.txt)
# 4. the paper's networks in 8 GiB, one image at a time (8gib.txt)
#
# Each part has a time limit and may fail without the others; what each said is in its .log.
set -u
archive=$1 out=$2
device=${DEVICE:-cuda} quick=${QUICK:-}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
mkdir -p "$out"
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}"
part() { # name, seconds, command
  local name=$1 limit=$(($2 * patience)) begun=$SECONDS
  shift 2
  timeout "$limit" "$@" > "$out/$name.txt" 2> "$out/$name.log"
  echo "$name: exit $?, $((SECONDS - begun)) s"
}

size=256 steps=1200 minutes=2 patience=1 speed=(--rounds 3 --repeats 5 --training-batch 16)
if [ -n "$quick" ]; then
  size=32 steps=4 minutes=1 patience=10 speed=(--quick --tiny --size 32 --rounds 1 --runtimes)
fi
part speed 330 "$python" "$here/speed.py" --device "$device" --out "$out" "${speed[@]}" --only \
  "paper fp32" "paper fp16" "paper bf16 channels-last" "decoder bf16 channels-last" \
  "kseg-fast bf16 channels-last" "ResNet-34 bf16 channels-last" "(DynUNet) bf16 channels-last"

part prepare 60 "$python" -m sdseg_cli prepare kseg --source "$archive" --size $size --out "$out/kseg" --overwrite
part train 200 "$python" -m sdseg_cli train --recipe kseg-fast --device "$device" --out "$out/run" --overwrite \
  --set "data.dataset=$out/kseg" --set data.image_size=$size --set train.max_minutes=$minutes \
  --set train.steps=$steps --set train.warmup_steps=2 --set train.validate_every=100 --set data.workers=8
for setting in "fp32 --no-compile" "auto --no-compile" "auto --compile"; do
  name="dice-${setting// /}"
  # shellcheck disable=SC2086
  part "$name" 90 "$python" -m sdseg_cli evaluate --model "$out/run" --split validation --device "$device" \
    --precision $setting --json --out "$out/$name" --overwrite
done
"$python" - "$out" <<'END' | tee "$out/dice.txt"
import json, sys
from pathlib import Path

for path in sorted(Path(sys.argv[1]).glob("dice-*.txt")):
    text = path.read_text()
    classes = json.loads(text)["classes"] if text else {}
    mean = next((found["metrics"]["dice"]["mean"] for found in classes.values()), "failed")
    print(path.stem.removeprefix("dice-"), mean)
END
if [ -z "$quick" ]; then
  part 8gib 120 "$python" "$here/training_step.py" "$out/kseg" --device "$device" --only paper --batch 4 \
    --memory-gib 7.5 --variants "latents kept" --warm-up 2 --steps 5 \
    --set train.gradient_accumulation=4 --set train.gradient_checkpointing=true --set train.ema_decay=0
fi
echo "all of it: $SECONDS s"
