#!/bin/bash
#SBATCH --array=0-7
#SBATCH --job-name=safelm
# Runs a command as an array of SLURM jobs, each on its own slice of the work:
#
#     sbatch --array=0-63 scripts/slurm_array.sh python -m safelm.score --output_rows=annotations \
#         --input='web/*.parquet' --output=runs/scores --scorers=classifier:DIR
#
# No slice waits for another, and the last to end writes the manifest. Give the array again to go on: what is done is
# left out. For some slices of it say how many there are: SLICES=64 sbatch --array=3,17 ... The command with --dry_run
# prints the plan and such a script with the command and the number of slices filled in.
if [ $# -eq 0 ] || [ "$1" = --help ]; then
    sed -n '4,11s/^# \{0,1\}//p' "$0"
    exit 0
fi
set -euo pipefail
"$@" "--array_task=$SLURM_ARRAY_TASK_ID/${SLICES:-$SLURM_ARRAY_TASK_COUNT}"
