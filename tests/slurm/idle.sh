#!/bin/bash
# Stands in for Python: a training program that computes nothing, and stops when told to (polite; saving: with a
# checkpoint) or never (deaf).
kind=$1
shift
if [ "$2" != job.train ]; then exec "$CYCLEVAE_TEST_PYTHON" "$@"; fi
if [ "$kind" = deaf ]; then trap '' USR1 USR2 TERM; else trap 'exit 143' USR1; fi
for argument in "$@"; do
    case $argument in
        logging.save_dir=*) directory=${argument#*=} ;;
        logging.run_name=*) name=${argument#*=} ;;
    esac
done
touch "$directory/$name/environment.json"  # the ranks have met
if [ "$kind" = saving ]; then mkdir -p "$directory/$name/checkpoints/step_$(date +%s)"; fi
while true; do sleep 0.5; done
