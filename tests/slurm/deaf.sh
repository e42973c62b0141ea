#!/bin/bash
# Stands in for Python: a training program that hears no signal.
if [ "$2" = job.train ]; then
    trap '' USR1 USR2 TERM
    sleep 600 & sleep 600
fi
exec "$REAL" "$@"
