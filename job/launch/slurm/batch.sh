# The batch step of a run under SLURM: starts the ranks, passes signals on to them, and requeues the job when its exit code says so.
# Sourced by slurm/train.sbatch and written into the job scripts of hydra/launcher=slurm. Only bash and SLURM's commands are needed,
# also when the ranks live in a container that has neither.

export SLURM_EXIT_ERROR=135  # srun's own failures (a node that does not answer), told apart from the ranks' exit codes
export PYTHONUNBUFFERED=1
asked=""  # the first signal that told this job to stop
ranks=""  # process id of srun
requeued=""

job=$SLURM_JOB_ID
if [ -n "$SLURM_ARRAY_JOB_ID" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

field() { scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null | grep -o "\b$1=[A-Za-z_]*" | cut -d= -f2; }

note() {  # EVENT REASON [EXIT_CODE]: a line for people in the log, one for programs in events.jsonl
    echo "slurm: $(date '+%F %T') job $job, restart ${SLURM_RESTART_COUNT:-0}: $1 ($2)"
    printf '{"time": %s, "job": "%s", "restarts": %s, "event": "%s", "reason": "%s", "exit_code": %s, "nodes": "%s"}\n' \
        "$(date +%s)" "$job" "${SLURM_RESTART_COUNT:-0}" "$1" "$2" "${3:-null}" "$SLURM_JOB_NODELIST" >>"$notes/events.jsonl"
}

insist() {  # USR1 to the ranks once they have met: before, it would end a rank whose Python is starting, and the others would wait for that one
    while [ ! -e "$run_dir/environment.json" ] || [ "$run_dir/environment.json" -ot "$notes/started" ]; do
        kill -0 "$ranks" || return
        sleep 1
    done
    while kill -USR1 "$ranks"; do sleep 5; done
}

on_signal() {
    asked=${asked:-$1}
    # SLURM sends TERM to the ranks by itself; a second one would end them without saving, a USR1 more changes nothing.
    [ -z "$ranks" ] || insist >/dev/null 2>&1 &
    # SLURM requeues by itself after preemption and node failures, after a time limit never. At once, as KILL comes soon.
    if [ "$1" = TERM ] && [ -n "$ranks" ] && [ "$(field Reason)" = TimeLimit ]; then requeue "time limit reached" 143; fi
}
for signal in USR1 USR2 TERM; do trap "on_signal $signal" $signal; done

requeue() {  # REASON EXIT_CODE: give up after max_restarts restarts without a new checkpoint
    local newest last_job last fruitless error
    newest=$(ls "$run_dir/checkpoints" 2>/dev/null | grep '^step_[0-9]*$' | tail -n 1)
    newest=${newest:-none}
    read -r last_job last fruitless 2>/dev/null <"$notes/restarts"
    if [ "$last_job $last" != "$job $newest" ]; then fruitless=0; fi
    if [ "$fruitless" -ge "$max_restarts" ]; then
        note failed "$1; not requeued: $fruitless restarts without a new checkpoint, max_restarts=$max_restarts" "$2"
    else
        requeued=yes
        echo "$job $newest $((fruitless + 1))" >"$notes/restarts"
        note requeued "$1; restart $((fruitless + 1)) of at most $max_restarts from checkpoint $newest" "$2"
        error=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) || note failed "cannot be requeued: ${error//\"/}" "$2"
    fi
}

interrupted_early() {  # EXIT_CODE of what comes before the ranks: requeue if a signal ended it, exit
    if [ "$1" -ge 128 ] && [ "$(field JobState)" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$1"
}

supervise() {  # RUN_DIR TARGETS_DIR MAX_RESTARTS COMMAND...: run srun's COMMAND to its end; returns its exit code
    local code heartbeat targets=$2
    run_dir=$1 max_restarts=$3 notes=$1/slurm
    shift 3
    mkdir -p "$notes" || return 1
    exec >>"$notes/$job.log" 2>&1
    note started "$SLURM_JOB_NUM_NODES nodes, $SLURM_NTASKS tasks"
    if [ -n "$asked" ]; then
        code=143
    else
        touch "$notes/alive"  # not by the loop: a touch under way would outlive it, and the sign the run
        while sleep 20 && touch "$notes/alive"; do :; done >/dev/null 2>&1 &
        heartbeat=$!
        touch "$notes/started"  # rank 0, on this node, writes environment.json after it
        "$@" &
        ranks=$!
        [ -z "$asked" ] || insist >/dev/null 2>&1 &
        while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done  # a signal interrupts wait
        wait "$ranks"
        code=$?
        kill "$heartbeat" 2>/dev/null
        rm -f "$notes/alive" "$targets"/cyclevae-*@"$SLURM_JOB_ID.json"  # where Prometheus would look for ranks that were killed
    fi
    if [ "$code" = 0 ]; then
        note finished "exit code 0" 0
    elif [ "$code" -lt 128 ]; then
        note failed "exit code $code: a retry will not mend it" "$code"
    else
        after_interruption "$code"
    fi
    return "$code"
}

after_interruption() {  # EXIT_CODE of 128 or more: stopped, lost a rank, or killed
    local reason="exit code $1" state
    if [ -n "$asked" ]; then reason="told to stop by SIG$asked, exit code $1"; fi
    if [ "$1" = 135 ]; then reason="srun could not run the tasks"; fi
    [ -z "$requeued" ] || return  # already, at the time limit
    state=$(field JobState)
    if [ "$state" = RUNNING ]; then
        requeue "$reason" "$1"
    else  # cancelled, requeued by an administrator, preempted, out of time
        note stopped "$reason; SLURM decides, state $state" "$1"
    fi
}
