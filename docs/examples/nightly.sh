#!/bin/bash
# A nightly evaluation, from cron: the newest checkpoint on eight tasks, then a report, whatever has become of them.
#     0 2 * * *  cd /data/llama && ./nightly.sh
set -euo pipefail

night=$(date +%F)

# The same id is the same job: run twice, this submits once.
evaluation=$(corral submit --quiet --submit-id "eval-$night" --name "eval-$night" \
    --gpus 1 --array 0-7 --retries 1 --max 2h --cd "$PWD" \
    -- sh -c 'python evaluate.py --checkpoint latest --task "$CORRAL_ARRAY_INDEX"')

corral submit --quiet --submit-id "report-$night" --name "report-$night" \
    --after "$evaluation:any" --gpus 0 --cpus 1 --cd "$PWD" -- python report.py "$night"
