#!/usr/bin/env bash
# A real model answers a question about a real document; its keys stay spread over RANKS processes. `make run` calls this.
#   launch/quickstart.sh                          the defaults below
#   RANKS=4 launch/quickstart.sh --json           more ranks; further arguments go to `ringctx generate`
#   DOCUMENT=my.txt QUESTION='Who is Ann?' launch/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
RANKS=${RANKS:-2}
CONFIG=${CONFIG:-configs/smollm2_cpu.yaml}
DOCUMENT=${DOCUMENT:-launch/documents/ruth.txt}
QUESTION=${QUESTION:-"What was the name of Naomi's husband?"}

[ -e "$VENV/.ready" ] || make setup VENV="$VENV"
echo "document  $DOCUMENT ($(wc -c <"$DOCUMENT") bytes)" >&2
echo "question  $QUESTION" >&2
echo "ranks     $RANKS" >&2
exec "$VENV/bin/ringctx" generate "$CONFIG" --document "$DOCUMENT" --question "$QUESTION" --ranks "$RANKS" "$@"
