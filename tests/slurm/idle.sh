#!/bin/bash
# Stands in for Python: a training program that computes nothing, and stops when told to (polite) or never (deaf).
kind=$1
shift
if [ "$2" != job.train ]; then exec "$CYCLEVAE_TEST_PYTHON" "$@"; fi
if [ "$kind" = polite ]; then trap 'exit 143' USR1; else trap '' USR1 USR2 TERM; fi
for argument in "$@"; do
    case $argument in
        logging.save_dir=*) directory=${argument#*=} ;;
        logging.run_name=*) name=${argument#*=} ;;
    esac
done
touch "$directory/$name/environment.json"  # the ranks have met
while true; do sleep 0.5; done
