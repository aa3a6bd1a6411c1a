#!/usr/bin/env bash
# All that a GPU has to say about this checkout: bench/run_gpu.sh [--quick|--second|--full] [--rehearse] [--only 'STAGE|STAGE'] [--out DIR]
#
# Tests, tuning, benchmarks, report. --quick (the default) and --second end within 4 minutes each and together are what a
# first hour wants to know, --full takes hours. DIR (docs/results/GPU-DATE-RUN by default) holds at any moment what there is
# so far: summary.md, rows.jsonl, in the end README.md with plots, and results.tar.gz with all of it and every log. A stage
# that fails stops no other; the exit status is 1 then, 130 after Ctrl-C. --only runs the stages whose names begin so.
# --rehearse imitates the GPU: every stage in about a minute, and not a single figure. Needs neither network nor
# installation, writes nothing into checkout or home; what is needed and missing is said at once. $PYTHON, or python3.
# Without a GPU the same stages run small on the CPU, into a temporary DIR, and measure no GPU.
exec "${PYTHON:-$(command -v python3 || command -v python)}" -B "$(dirname "${BASH_SOURCE[0]}")/run.py" "$@"
