#!/bin/sh
# Trains heads and fails when fewer of their drafts are accepted than before.
#
#   sh examples/ci/gate.sh demo runs/weekly baselines/main.json --suite demo --max-drop 0.01
#
# A recipe, a new run directory, and an acceptance file that is kept under version control as the baseline; what follows
# are options of `mtpd eval`. The first call, without a baseline, writes it. Exit code: 0 fine, 3 worse, 4 undecided;
# Markdown and JUnit XML are left in the run directory.
set -eu

recipe=$1 run=$2 baseline=$3
shift 3

mtpd distill "$recipe" "output=$run"

if [ ! -f "$baseline" ]; then
    echo "no baseline yet: $baseline is written from this run; commit it"
    exec mtpd eval "$run" --write-baseline "$baseline" "$@"
fi

code=0
mtpd eval "$run" --against "$baseline" --markdown "$run/acceptance.md" --junit "$run/acceptance.xml" "$@" || code=$?
case $code in
    0) echo "acceptance is not worse than $baseline" ;;
    3) echo "acceptance is worse than $baseline; see $run/acceptance.md" ;;
    4) echo "too few prompts to tell from $baseline; add a suite or raise --limit" ;;
    *) echo "mtpd eval failed with exit code $code" ;;
esac
exit $code
