#!/usr/bin/env bash
# The front door:
#   bash run.sh                            set up .venv, run the demo (3 to 4 minutes on two CPU cores)
#   bash run.sh test [pytest arguments]    set up, run the tests
#   bash run.sh train CONFIG [--key value …]   grpo.py on all visible GPUs, or on the CPU
#   bash run.sh eval MODEL [--bfcl DIR] [--categories single_turn,multi_turn] [--apibank DIR] [--limit N]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# After a signal torchrun kills its workers in 30 s, which may be less than the step and the checkpoint take.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else processes that torchrun starts again look for the dead ones

fail() { # what happened, what to try
  echo "run.sh: $1" >&2
  echo "run.sh: try: $2" >&2
  exit 1
}

has_gpu() { [ -n "$(nvidia-smi --list-gpus 2>/dev/null || true)" ]; }

install() { # everything of requirements.txt, into .venv, quietly; the log tells why if it fails
  local torch log=.venv/install.log
  torch=$(grep '^torch==' requirements.txt)
  python -m pip install --quiet --upgrade pip >"$log" 2>&1 || true
  if ! has_gpu; then
    # PyTorch's own index has builds without CUDA; from the usual one, torch brings gigabytes of it.
    python -m pip install --quiet --timeout 15 --retries 1 --index-url https://download.pytorch.org/whl/cpu "$torch" \
      >>"$log" 2>&1 || echo "run.sh: no CPU build at download.pytorch.org; taking $torch from the default index"
  fi
  python -m pip install --quiet --requirement requirements.txt >>"$log" 2>&1 \
    || fail "installing requirements.txt failed, see $log: $(grep -m1 -i error "$log" || tail -n 1 "$log")" \
      "check the network and the disk (df -h .), then run the same command again"
  if [ -n "${FLASH_ATTN:-}" ]; then
    echo "run.sh: building flash-attn, at most 30 minutes"
    MAX_JOBS=${MAX_JOBS:-8} timeout 1800 python -m pip install --quiet --no-build-isolation flash-attn >>"$log" 2>&1 \
      || echo "run.sh: flash-attn did not install; going on with torch's kernels"
  fi
}

setup() {
  local python=${PYTHON:-python3} stamp
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    || fail "Python 3.11 or newer is needed" "install it, or name one: PYTHON=/path/to/python3 bash run.sh"
  if [ ! -x .venv/bin/python ]; then
    rm -rf .venv
    "$python" -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; fail "cannot make .venv" "apt-get install python3-venv"; }
  fi
  export PATH="$PWD/.venv/bin:$PATH"
  stamp=.venv/installed.txt
  if ! cmp -s requirements.txt "$stamp"; then
    echo "run.sh: installing requirements.txt into .venv (once)"
    install
    cp requirements.txt "$stamp"
  fi
}

launch() { # one process per core, at most two: the tiny model's matrices are too small to share one between threads
  if [ "$(env -u OMP_NUM_THREADS nproc)" -ge 2 ] && ! has_gpu; then
    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node=2 "$@"
  else
    python "$@"
  fi
}

demo() {
  local run=runs/demo flops
  trap 'echo "run.sh: stopped; the line above says how to go on (bash run.sh would begin again)" >&2; exit 130' INT TERM
  echo "run.sh: building a tiny model, warming it up on imperfect demonstrations, then GRPO against the verifier"
  launch grpo.py --config configs/tiny.yaml --run_dir $run --overwrite true \
    || fail "the demo stopped; the first error line above says why" "bash run.sh, or to go on: bash run.sh train $run/config.yaml --resume true"
  flops=$(python -c "import json; print(json.load(open('$run/summary.json'))['flops'])")
  echo "run.sh: the baseline: more SFT on the same data, with the compute that GRPO took"
  launch sft.py --config configs/tiny.yaml --model $run/warmup/model --sft_flops "$flops" --sft_batch 32 --run_dir $run/sft \
    || fail "the SFT baseline stopped; the first error line above says why" "bash run.sh"
  python -m ops.plot $run
}

train() {
  local config=${1:-} gpus=0
  [ -f "$config" ] || fail "no such config: '$config'" "one of: $(ls configs/*.yaml | tr '\n' ' ')"
  shift
  if has_gpu; then gpus=$(python -c 'import torch; print(torch.cuda.device_count())'); fi
  if [ "$gpus" -gt 0 ]; then
    python -m torch.distributed.run --standalone --nproc_per_node="$gpus" grpo.py --config "$config" "$@"
  else
    launch grpo.py --config "$config" "$@"
  fi
}

run_tests() { # in three parts side by side: drill and demo, other tests of many processes (both wait a lot), the rest
  local file drill=() many=() rest=() name jobs status=0
  python -c 'import bfcl_eval' 2>/dev/null || python -m pip install --quiet --no-deps bfcl-eval==2026.3.23 \
    >>.venv/install.log 2>&1 || echo "run.sh: bfcl-eval did not install; the tests of dialogues are skipped"
  [ $# -eq 0 ] || { python -m pytest "$@"; return; }
  for file in tests/test_*.py tests/gpu/test_*.py; do
    name=${file##*/test_}
    case "${name%.py}" in
      faults | end_to_end | distill) drill+=("$file") ;;
      fsdp | nodes | ranks | checkpoint | grpo | lora | bench_gpu | cuda_fake) many+=("$file") ;;
      *) rest+=("$file") ;;
    esac
  done
  python -m pytest -q "${drill[@]}" >.venv/drill.log 2>&1 &
  jobs=$!
  python -m pytest -q "${many[@]}" >.venv/tests.log 2>&1 &
  jobs="$jobs $!"
  trap "kill $jobs 2>/dev/null || true" EXIT # also after Ctrl-C
  python -m pytest -q "${rest[@]}" || status=$?
  for name in $jobs; do wait "$name" || status=$?; done
  cat .venv/drill.log .venv/tests.log
  return $status
}

first_folder() { # the first of the arguments that is a folder
  local folder
  for folder in "$@"; do [ -d "$folder" ] && echo "$folder" && return; done
}

evaluate() {
  local model=${1:-} bfcl apibank out= options=() parts=()
  [ -n "$model" ] || fail "eval needs a model folder or hub id" "bash run.sh eval runs/demo/model --limit 20"
  shift
  bfcl=$(first_folder "${BFCL_DATA:-}" data/bfcl ../shared/data/bfcl || true)
  apibank=$(first_folder "${APIBANK_DATA:-}" data/apibank ../shared/data/apibank || true)
  while [ $# -gt 0 ]; do
    case "$1" in
      --bfcl) bfcl=${2:-} ;;
      --apibank) apibank=${2:-} ;;
      --out) out=${2:-} ;;
      --categories) parts=("$1" "${2:-}") ;; # of BFCL
      --limit | --max_new_tokens | --batch_size | --prompt_template) options+=("$1" "${2:-}") ;;
      *) fail "unknown option of eval: $1" "--bfcl DIR, --categories PARTS, --apibank DIR, --out DIR, --limit N, --max_new_tokens N, --batch_size N or --prompt_template FILE" ;;
    esac
    shift 2 || fail "the last option of eval lacks its value" "bash run.sh eval MODEL --limit 20"
  done
  out=${out:-runs/eval/${model//\//_}}
  [ -n "$bfcl$apibank" ] || fail "no benchmark data found" \
    "pip install --no-deps bfcl-eval, or clone github.com/ShishirPatil/gorilla, and give its folder with --bfcl DIR"
  if [ -n "$bfcl" ]; then
    python eval_bfcl.py generate --model "$model" --data "$bfcl" --out "$out/bfcl" ${parts[@]+"${parts[@]}"} \
      ${options[@]+"${options[@]}"}
    python eval_bfcl.py score --predictions "$out/bfcl/predictions.jsonl" --data "$bfcl" --out "$out/bfcl"
  fi
  if [ -n "$apibank" ]; then
    python eval_apibank.py generate --model "$model" --data "$apibank" --out "$out/apibank" ${options[@]+"${options[@]}"}
    python eval_apibank.py score --predictions "$out/apibank/predictions.jsonl" --data "$apibank" --out "$out/apibank"
  fi
}

command=${1:-demo}
[ $# -gt 0 ] && shift
case "$command" in
  demo) setup; demo ;;
  test) setup; run_tests "$@" ;;
  train) setup; train "$@" ;;
  eval) setup; evaluate "$@" ;;
  -h | --help) sed -n '2,6s/^# //p' run.sh ;;
  *) sed -n '2,6s/^# //p' run.sh >&2 && fail "unknown command: $command" "bash run.sh" ;;
esac
