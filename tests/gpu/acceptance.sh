#!/usr/bin/env bash
# Whether this program works on your GPUs: 10 minutes, on 1 to 8 GPUs of one machine.
#
#   pip install -e ".[test]"                       # once, in the checkout
#   bash tests/gpu/acceptance.sh [FOLDER]          # logs, and table.md: the file to send
#   DEVICE=cpu bash tests/gpu/acceptance.sh        # without a GPU: a rehearsal of what can be
#
# Needs no weights and no images: both are made. No check stops the others, and Ctrl-C ends all of
# them with a table of what was seen. Exit code: 1 if one failed, 2 if nothing could be checked, 128
# and the signal's number if a signal ended it, else 0.
#
# Edit, or give in front:
#   DEADLINE=600    seconds; a step that cannot end before is skipped; 600, or 3600 on a CPU
#   LIMITS=2        times the limits of the steps, for a slow machine; 1, or 3 on a CPU
#   GPUS=2          how many to use; all, but at most 8, if not given
#   PYTHON=python3  with torch and the package
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
here=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-python3}" "$here/acceptance.py" "$@"
