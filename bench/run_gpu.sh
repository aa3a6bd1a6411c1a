#!/usr/bin/env bash
# All that a GPU has to say about this checkout: bench/run_gpu.sh [--quick|--full] [--only 'STAGE|STAGE'] [--out DIR]
#
# Tests on the device, tuning, benchmarks, report; each stage with a time limit, a log DIR/STAGE.log and a line in
# DIR/summary.md. A stage that fails stops no other; the exit status is 1 then, 130 after Ctrl-C. --quick (the default)
# ends within 8 minutes, --full takes hours; --only runs the stages whose names begin so. DIR is docs/results/GPU-DATE by default. Needs neither network nor
# installation: torch, transformers, pytest, pytest-benchmark and matplotlib have to be there ($PYTHON, or python3).
# Without a GPU the same stages run small on the CPU, into a temporary DIR, and measure no GPU.
set -u
set -m # each stage in its own process group, and not deaf to SIGINT as the shell's background jobs are
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$(command -v python3 || command -v python)}
extent=quick out="" only="" failed=0 interrupted="" child=""

usage() { echo "usage: bench/run_gpu.sh [--quick|--full] [--only 'STAGE|STAGE'] [--out DIR]" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --quick | --full) extent=${1#--} ;;
        --only) only=${2-}; shift; [ -n "$only" ] || usage ;;
        --out) out=${2-}; shift; [ -n "$out" ] || usage ;;
        *) usage ;;
    esac
    shift
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# This checkout under the names that it is installed by, whatever is installed; stages run beside it.
mkdir "$scratch/siglip_fast"
ln -s "$repo"/siglip_fast/* "$repo/kernels" "$scratch/siglip_fast/"
export PYTHONPATH=$scratch${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 SIGLIP_FAST_BENCH=$extent
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
if [ -n "$gpu" ]; then
    slug=$(tr '[:upper:]' '[:lower:]' <<<"$gpu" | tr -cs '[:alnum:]\n' -)
    out=${out:-$repo/docs/results/$slug-$(date +%F)}
else
    out=${out:-$(mktemp -d)}
    echo "NO GPU HERE: the stages run small on the CPU. Nothing below measures a GPU."
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
export SIGLIP_FAST_CACHE_DIR=${SIGLIP_FAST_CACHE_DIR:-$out/tuned} # what is tuned belongs to the results
[ -n "$only" ] || : >"$out/summary.md"

row() { printf '| %s | %s | %s |\n' "$@" | tee -a "$out/summary.md"; }
stage() { # NAME LIMIT COMMAND…
    local name=$1 limit=$2 start=$SECONDS result
    shift 2
    if [ -n "$interrupted" ] || ! [[ $name =~ ^($only) ]]; then return; fi
    # SIGINT, because pytest then still writes what it has measured
    (cd "$scratch" && exec timeout -s INT -k 20 "$limit" "$@") >"$out/$name.log" 2>&1 </dev/null &
    child=$!
    wait "$child"
    result=$?
    if [ -n "$interrupted" ]; then wait "$child"; result=interrupted; fi
    child=""
    case $result in
        0) result=pass ;;
        124 | 137) result="FAIL: not done after $limit s" ;;
        interrupted) ;;
        *) result="FAIL: exit status $result" ;;
    esac
    if [ "${name%%-*} $result" = "tune FAIL: exit status 1" ]; then result="partial: see its log"; fi
    case $result in pass | partial*) ;; *) failed=1 ;; esac
    row "$name" "$result" $((SECONDS - start))
}
interrupt() {
    interrupted=1
    if [ -n "$child" ]; then kill -INT -- "-$child" 2>/dev/null; fi
}
trap interrupt INT TERM

cli=("$python" -c 'import sys; from siglip_fast.cli.main import main; sys.exit(main())')
tests() { # NAME LIMIT SELECTION FILE…: of those in tests/
    local name=$1 limit=$2 select=$3
    shift 3
    stage "$name" "$limit" "$python" -m pytest -q -o addopts=--import-mode=importlib "${@/#/$repo/tests/}" -k "$select" -m "$marked"
}
bench() { # NAME LIMIT
    stage "bench-$1" "$2" "$python" -m pytest -q -rs "$repo/bench/test_$1.py" --benchmark-json "$out/raw-$1.json"
}

# Limits in seconds. A quick run on a GPU has 480 altogether; the model's benchmark gets what the tests leave of it.
marked="not slow and not mutants" dtypes=bfloat16 budget=60
kernels="triton and bf16 and (base or so400m)" model="not published and not full_depth and not (torch or cpu)"
compiled="test_graphs or one_operation or opcheck or modes"
tuned="base-patch16-224" batch_sizes="1 64" precision=bfloat16
limits=(60 40 40 100 60 20)
left() { echo $((480 - 80 - SECONDS)); }
if [ -z "$gpu" ]; then
    kernels="fp32 and (cpu and base or triton and one-token)" model="TestOutputs and cpu"
    compiled="outputs_survive or weight_edits or opcheck"
    limits=(300 300 300 30 300 60) precision=float32
    left() { echo 600; }
elif [ "$extent" = full ]; then
    marked="not mutants" kernels="" model="" compiled="" dtypes="bfloat16 float16" budget=600
    tuned="base-patch16-224 base-patch16-384 large-patch16-384" batch_sizes="1 8 64 256"
    tuned+=" so400m-patch14-224 so400m-patch14-384 so400m-patch14-896"
    limits=(7200 3600 3600 900 14400 300)
    left() { echo 43200; }
fi

row stage result seconds
row --- --- ---
stage info 60 "${cli[@]}" info --dtype $precision
tests tests-kernels "${limits[0]}" "$kernels" \
    kernels/test_{patch_embed,layernorm_linear,attention,linear_residual,layernorm,attention_pool,configs}.py
tests tests-model "${limits[1]}" "$model" models/test_{siglip,weights}.py
tests tests-graphs-compile "${limits[2]}" "$compiled" running/test_{graphs,traced}.py
for variant in $tuned; do
    for dtype in $dtypes; do
        if [ -z "$gpu" ]; then row "tune-$variant-$dtype" "skipped: no GPU" 0; continue; fi
        stage "tune-$variant-$dtype" "${limits[3]}" "${cli[@]}" tune --random-weights "$variant" \
            --batch-sizes $batch_sizes --dtype "$dtype" --budget "$budget"
    done
done
bench model "$(left)"
bench kernels "${limits[4]}"
stage report "${limits[5]}" "$python" "$repo/bench/report.py" "$out/raw-model.json" "$out/raw-kernels.json" --out "$out"

if [ -e "$out/README.md" ]; then cat "$out/README.md"; fi
echo "Results: $out"
if [ -z "$gpu" ]; then echo "NO GPU WAS MEASURED."; fi
if [ -n "$interrupted" ]; then exit 130; fi
exit $failed
