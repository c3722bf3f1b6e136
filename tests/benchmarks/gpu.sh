#!/usr/bin/env bash
# Every figure of docs/speed.md that takes a GPU, on a large one with 16 cores in six minutes:
#
#   tests/benchmarks/gpu.sh kvasir-seg.zip results/gpu
#   DEVICE=cpu QUICK=1 tests/benchmarks/gpu.sh kvasir-seg.zip results/try    # only shows that it runs
#
# 1. images/s of the networks, as published and at our settings, and samples/s and peak memory of trainings.
#    Each is a process; they compile side by side, and are timed one at a time (turns.py). COMPILING seconds
#    are waited for the slowest (600).
# 2. the tests of what only a GPU does (cuda.txt)
# 3. a training of kseg-fast on Kvasir-SEG of MINUTES (2): seconds to its validation Dice (run/metrics.jsonl)
# 4. its Dice in float32 and in bf16, which should differ by 0.001 at most (dice.txt)
#
# A part may fail or be late without the others; what each said is in its .log, the figures in figures.txt.
set -u
archive=$1 out=$2
device=${DEVICE:-cuda} quick=${QUICK:-} compiling=${COMPILING:-600} minutes=${MINUTES:-2} workers=${WORKERS:-12}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}

part() { # name, seconds, command
  local name=$1 limit=$2 begun=$SECONDS
  shift 2
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.txt" 2> "$out/$name.log"
  echo "$name: exit $?, $((SECONDS - begun)) s"
}

turns=$(mktemp -d)
touch "$turns/begun"
parts=0
compared() { # name, command: one of those that are timed in turn
  parts=$((parts + 1))
  started+=("$@" "--end--")
}
started=()
launch() {
  local command=() word
  export SDSEG_TURNS="$turns:$parts:$compiling"
  for word in "${started[@]}"; do
    if [ "$word" = "--end--" ]; then
      { part "${command[0]}" $((compiling + 120)) "${command[@]:1}"; touch "$turns/ended-${command[0]}"; } &
      command=()
    else
      command+=("$word")
    fi
  done
}

size=256 steps=1500 warmup=100 speed=(--device "$device" --rounds 3 --repeats 5 --no-training)
if [ -n "$quick" ]; then
  size=32 steps=4 warmup=2 minutes=1 speed=(--device "$device" --quick --tiny --size 32 --rounds 1 --runtimes --no-training)
fi
prepare=(-m sdseg_cli prepare)
part phantom 120 "$python" "${prepare[@]}" phantom --size $size --cases 40 --out "$out/phantom" --overwrite
(part prepare 120 "$python" "${prepare[@]}" kseg --source "$archive" --size $size --out "$out/kseg" --overwrite) &

measure=("$python" "$here/speed.py" "${speed[@]}")
ours="bf16 channels-last recorded" compiled="bf16 channels-last compiled recorded"
compared published "${measure[@]}" --only "=paper fp32" "=paper fp16" "=paper $ours"
compared small "${measure[@]}" --only \
  "=kseg-fast fp32" "=kseg-fast bf16 channels-last" "=kseg-fast $ours" \
  "=U-Net ResNet-34 fp32" "=U-Net ResNet-34 bf16 channels-last" "=U-Net ResNet-34 $ours" \
  "=nnU-Net-like (DynUNet) fp32" "=nnU-Net-like (DynUNet) bf16 channels-last" "=nnU-Net-like (DynUNet) $ours"
if [ -z "$quick" ]; then
  compared paper-1 "${measure[@]}" --batches 1 --only "=paper $compiled"
  compared paper-16 "${measure[@]}" --batches 16 --only "=paper $compiled"
  compared decoder-16 "${measure[@]}" --batches 16 --only "=paper, built-in mask decoder $compiled"
  compared kseg-fast "${measure[@]}" --only "=kseg-fast $compiled"
  compared unet "${measure[@]}" --only "=U-Net ResNet-34 $compiled"
  compared nnunet "${measure[@]}" --only "=nnU-Net-like (DynUNet) $compiled"
  training=("$python" "$here/training_step.py" "$out/phantom" --device "$device" --steps 10 --set data.workers=2)
  paper=("${training[@]}" --only paper --batch 16)
  compared train-published "${paper[@]}" --variants "as published"
  compared train-fast "${paper[@]}" --variants "fast:"
  compared train-frugal "${paper[@]}" --variants "frugal:"
  compared train-8gib "${training[@]}" --only paper --batch 4 --memory-gib 7.5 --variants "=float32, latents kept" \
    --set train.gradient_accumulation=4 --set train.gradient_checkpointing=true --set train.ema_decay=0
  light=("${training[@]}" --only kseg-fast --batch 32 --set "data.workers=6")
  compared train-light "${light[@]}" --variants "=bf16, latents kept"
  compared train-light-compiled "${light[@]}" --variants "fast:"
fi
launch
wait
unset SDSEG_TURNS
for name in "$out"/*.txt; do
  case $(basename "$name") in figures.txt | dice* | cuda.txt | prepare.txt | phantom.txt) continue ;; esac
  grep -hE '^\||^matrix|samples_per_second|peak_gib|^  "' "$name"
done > "$out/figures.txt"
cat "$out/figures.txt"
part cuda "$compiling" "$python" -m pytest "$here/../engine/test_cuda.py" -q -p no:cacheprovider
tail -n 4 "$out/cuda.txt"

part train $((minutes * 60 + 120)) "$python" -m sdseg_cli train --recipe kseg-fast --device "$device" \
  --out "$out/run" --overwrite --set "data.dataset=$out/kseg" --set data.image_size=$size \
  --set train.max_minutes="$minutes" --set train.steps=$steps --set train.warmup_steps=$warmup \
  --set train.validate_every=100 --set "data.workers=$workers"
for precision in fp32 auto; do
  part "dice-$precision" 120 "$python" -m sdseg_cli evaluate --model "$out/run" --split validation \
    --device "$device" --precision $precision --no-compile --json --out "$out/evaluated-$precision" --overwrite &
done
wait
"$python" - "$out" <<'END' | tee "$out/dice.txt"
import json, sys
from pathlib import Path

for path in sorted(Path(sys.argv[1]).glob("dice-*.txt")):
    text = path.read_text()
    classes = json.loads(text)["classes"] if text else {}
    mean = next((found["metrics"]["dice"]["mean"] for found in classes.values()), "failed")
    print(path.stem.removeprefix("dice-"), mean)
END
rm -rf "$turns" "$turns.lock"
echo "all of it: $SECONDS s"
