# Which nodes of a run lose ranks, and how a job is kept off one that has done so twice. It follows batch.sh, whose
# variables and functions it uses, in slurm/train.sbatch and in the job scripts of hydra/launcher=slurm.
#
# What is found is noted in RUN/slurm/nodes.jsonl, in lines of two kinds:
#     {"time": 1, "job": "12", "restarts": 0, "node": "n1", "ranks": [3]}     n1 lost rank 3 in this start
#     {"time": 1, "job": "12", "restarts": 1, "excluded": ["n1"]}             the job will not start on n1 again

note_places() {  # have every node of the step to come write down which ranks it has
    # How srun lays out ranks depends on many options. Each node knows its own, in the environment of a task's prolog;
    # one that users have set themselves is theirs, and then nothing is counted.
    export CYCLEVAE_PLACES=$notes/places
    rm -rf "$CYCLEVAE_PLACES"
    [ "${CYCLEVAE_EXCLUDE_BAD_NODES:-1}" = 1 ] && [ -z "$SLURM_TASK_PROLOG" ] || return 0
    mkdir -p "$CYCLEVAE_PLACES"
    cat >"$notes/place.sh" <<'PROLOG'
#!/bin/sh
if [ -n "$SLURM_STEP_ID" ] && [ "$SLURM_LOCALID" = 0 ]; then
    echo "$SLURM_GTIDS" >"$CYCLEVAE_PLACES/$SLURMD_NODENAME"
fi
exit 0
PROLOG
    chmod +x "$notes/place.sh"
    # Tried here first: on a file system without execution a prolog that fails might end the ranks.
    if (unset SLURM_STEP_ID; "$notes/place.sh") 2>/dev/null; then export SLURM_TASK_PROLOG=$notes/place.sh; fi
}

note_losses() {  # after a start that ended by itself: note the nodes whose ranks are the cause
    # A rank that was killed or froze leaves no word; one that hung names itself. The others say that they have lost
    # one: their failures are consequences. Ranks that have not met may wait for one that had no port, so nothing is
    # counted then. Where every one of several nodes has lost ranks, the program is to blame, or the run's file system.
    [ -z "$signal_received" ] && have_met || return 0
    local place rank lost now nodes=0 lines=()
    now=$(date +%s)
    for place in "$CYCLEVAE_PLACES"/*; do
        [ -e "$place" ] || return 0  # none was written
        nodes=$((nodes + 1)) lost=""
        for rank in $(tr , ' ' <"$place"); do
            grep -qs "\"rank\": $rank, .*\"consequence\": true" "$CYCLEVAE_FAILURES" || lost+=", $rank"
        done
        [ -z "$lost" ] || lines+=("$(printf '{"time": %s, "job": "%s", "restarts": %s, "node": "%s", "ranks": [%s]}' \
            "$now" "$job" "${SLURM_RESTART_COUNT:-0}" "${place##*/}" "${lost#, }")")
    done
    [ "${#lines[@]}" -gt 0 ] || return 0
    [ "$nodes" = 1 ] || [ "${#lines[@]}" -lt "$nodes" ] || return 0
    printf '%s\n' "${lines[@]}" >>"$notes/nodes.jsonl"
}

bad_nodes() {  # the nodes that lost ranks in two starts or more, with commas between them
    grep -so '"node": "[^"]*"' "$notes/nodes.jsonl" | sort | uniq --repeated | cut -d'"' -f4 | paste -sd,
}

avoid_bad_nodes() {  # of a job that has just been requeued
    # Only a pending job's list can be changed. SLURM ends this script for the requeue meanwhile: TERM must not end the
    # commands here, and KILL comes after KillWait only.
    trap '' TERM
    local bad excluded answer
    bad=$(bad_nodes)
    [ -n "$bad" ] || return 0
    answer=$(scontrol show job --oneliner "$job" 2>/dev/null)
    excluded=$(of_job ExcNodeList "$answer")  # the user's, and ours of earlier restarts; as n[1,3] where that is shorter
    if [ -n "$excluded" ]; then excluded=$(scontrol show hostnames "$excluded" | sort -u); fi
    bad=$(printf '%s\n' $excluded ${bad//,/ } | sort -u)
    [ "$bad" != "$excluded" ] || return 0
    bad=$(echo "$bad" | paste -sd,)
    if ! could_run_without "$bad" "$answer"; then
        echo "slurm: $(bad_nodes) lost ranks twice, but the job could not run without: not excluded"
        return
    fi
    if ! error=$(scontrol update JobId="$job" ExcNodeList="$bad" 2>&1); then
        echo "slurm: $(bad_nodes) lost ranks twice, but cannot be excluded: $error"
        return
    fi
    echo "slurm: $(bad_nodes) lost ranks twice: excluded from now on"
    printf '{"time": %s, "job": "%s", "restarts": %s, "excluded": ["%s"]}\n' \
        "$(date +%s)" "$job" "${SLURM_RESTART_COUNT:-0}" "${bad//,/\", \"}" >>"$notes/nodes.jsonl"
}

could_run_without() {  # NODES ANSWER: whether SLURM could ever start a job like this one, of which it says ANSWER
    # SLURM itself is asked, as it alone knows what else restricts a job. Whatever it refuses, nothing is excluded.
    local options=(--partition="$(of_job Partition "$2")" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_NTASKS")
    local name option value
    for name in account:Account qos:QOS reservation:Reservation constraint:Features cpus-per-task:CPUs/Task; do
        option=${name%:*} value=$(of_job "${name#*:}" "$2")
        [ -z "$value" ] || options+=("--$option=$value")
    done
    value=$(of_job MinMemoryNode "$2")
    [ -z "$value" ] || options+=("--mem=$value")
    value=$(of_job MinMemoryCPU "$2")
    [ -z "$value" ] || options+=("--mem-per-cpu=$value")
    value=$(of_job TresPerNode "$2")
    [ -z "$value" ] || options+=("--gres=$(echo "$value" | sed 's/gres[:/]//g')")
    echo '#!/bin/sh' | sbatch --test-only --exclude="$1" "${options[@]}" >/dev/null 2>&1
}

of_job() {  # NAME ANSWER: a field of what scontrol says of a job, whatever signs are in it; empty for none
    echo "$2" | grep -o "\b$1=[^ ]*" | head -n 1 | cut -d= -f2- | grep -vx '(null)'
}
