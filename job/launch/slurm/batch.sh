# The batch step of a run under SLURM: starts the ranks, passes signals on to them, and requeues the job when its exit
# code says so. Sourced by slurm/train.sbatch and written into the job scripts of hydra/launcher=slurm, where setup
# commands and `supervise` follow. Only bash and SLURM's commands are needed, also when the ranks live in a container
# that has neither.
#
# Variables of the whole script: job, signal_received, ranks, requeued here; run_dir, notes, max_restarts from
# `supervise`.

# srun's own failures (a node that does not answer) get a code of their own. The default is 1, which for a rank means
# that no retry helps. From 128 on the job is requeued.
export SLURM_EXIT_ERROR=135
export PYTHONUNBUFFERED=1
signal_received=""  # the first signal that told this job to stop
ranks=""            # process id of srun
requeued=""

job=$SLURM_JOB_ID
if [ -n "$SLURM_ARRAY_JOB_ID" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

interrupted_early() {  # EXIT_CODE of what comes before the ranks: requeue if a signal ended it, exit
    # No checkpoint can have come of this, and nothing is counted in a run directory yet: SLURM's own count must end
    # it.
    if [ "$1" -ge 128 ] && [ "$(field JobState)" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$1"
}

supervise() {  # RUN_DIR TARGETS_DIR MAX_RESTARTS COMMAND...: run srun's COMMAND to its end; returns its exit code
    local code targets=$2
    run_dir=$1 max_restarts=$3 notes=$1/slurm
    shift 3
    mkdir -p "$notes" || return 1
    exec >>"$notes/$job.log" 2>&1
    note started "$SLURM_JOB_NUM_NODES nodes, $SLURM_NTASKS tasks"
    export CYCLEVAE_FAILURES=$notes/failures.jsonl  # where ranks say why they failed; srun hands the variable on
    : >"$CYCLEVAE_FAILURES"                         # those of an earlier start explain nothing any more
    if [ -n "$signal_received" ]; then
        code=143
    else
        run_ranks "$@"
        code=$?
        # Where Prometheus would look for ranks that were killed; those that ended by themselves removed theirs.
        rm -f "$targets"/cyclevae-*@"$SLURM_JOB_ID.json"
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

run_ranks() {  # COMMAND...: run srun's COMMAND to its end; returns its exit code
    local heartbeat
    # `cyclevae slurm status` takes a run for alive whose file was touched a short while ago: events.jsonl says
    # nothing of a node that went down. The first touch is not the loop's: in a run that ends at once it could come
    # after the removal below, and the sign of life would outlive the run.
    touch "$notes/alive"
    while sleep 20 && touch "$notes/alive"; do :; done >/dev/null 2>&1 &
    heartbeat=$!
    touch "$notes/started"  # pass_on compares it with environment.json
    "$@" &
    ranks=$!
    [ -z "$signal_received" ] || pass_on >/dev/null 2>&1 &  # it came since supervise looked
    # A signal ends `wait` before the ranks have ended, and its value is the signal's then.
    while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done
    wait "$ranks"
    local code=$?
    kill "$heartbeat" 2>/dev/null
    rm -f "$notes/alive"
    return "$code"
}

on_signal() {  # SIGNAL
    signal_received=${signal_received:-$1}
    # Always as USR1: SLURM sends TERM to the ranks by itself, and a second TERM would end them without saving.
    [ -z "$ranks" ] || pass_on >/dev/null 2>&1 &
    # SLURM requeues by itself after preemption and node failures, after a time limit never. It has to be done at once
    # and not when the ranks have ended, as KILL comes after KillWait, to this script too.
    if [ "$1" = TERM ] && [ -n "$ranks" ] && [ "$(field Reason)" = TimeLimit ]; then
        requeue "time limit reached" 143
    fi
}

pass_on() {  # USR1 to the ranks, once they have met
    # Before, the signal would end a rank whose Python is still starting and has no handler, and the others would wait
    # for that one until they time out. Rank 0, on this node, writes environment.json when all have met; one that is
    # older than `started` is of an earlier start.
    while [ ! -e "$run_dir/environment.json" ] || [ "$run_dir/environment.json" -ot "$notes/started" ]; do
        kill -0 "$ranks" || return
        sleep 1
    done
    # Repeated, because srun loses a signal that comes while it launches the tasks, and says nothing of that. One USR1
    # more changes nothing in a rank that was told already.
    while kill -USR1 "$ranks"; do sleep 5; done
}

after_interruption() {  # EXIT_CODE of 128 or more: stopped, lost a rank, or killed
    local reason="exit code $1" state
    if [ -n "$signal_received" ]; then reason="told to stop by SIG$signal_received, exit code $1"; fi
    if [ "$1" = "$SLURM_EXIT_ERROR" ]; then reason="srun could not run the tasks"; fi
    [ -z "$requeued" ] || return  # already, at the time limit
    state=$(field JobState)
    if [ "$state" = RUNNING ]; then
        requeue "$reason" "$1"
    else  # cancelled, requeued by an administrator, preempted, out of time
        note stopped "$reason; SLURM decides, state $state" "$1"
    fi
}

requeue() {  # REASON EXIT_CODE: unless the run is to be given up by the rule of job/launch/restarts.py
    # The count is kept in the file restarts: the job, the newest checkpoint and the number of restarts from it. A job
    # with another number was submitted anew and counts from zero.
    local newest last_job last_newest count error code
    newest=$(newest_checkpoint)
    read -r last_job last_newest count 2>/dev/null <"$notes/restarts"
    if [ "$last_job $last_newest" != "$job $newest" ]; then count=0; fi
    if [ "$count" -ge "$max_restarts" ]; then
        note failed "$1; not requeued: $count restarts without a new checkpoint, max_restarts=$max_restarts" "$2"
        return
    fi
    requeued=yes
    # Both are written first: on `scontrol requeue` SLURM ends this script.
    echo "$job $newest $((count + 1))" >"$notes/restarts"
    note requeued "$1; restart $((count + 1)) of at most $max_restarts from checkpoint $newest" "$2"
    error=$(scontrol requeue "$SLURM_JOB_ID" 2>&1)
    code=$?
    # From 128 on a signal has ended scontrol: the requeue has begun, and SLURM ends all processes of the job for it.
    if [ "$code" -gt 0 ] && [ "$code" -lt 128 ]; then
        note failed "cannot be requeued: ${error//\"/}" "$2"
    fi
}

newest_checkpoint() {  # name of the checkpoint of the latest step; none
    local name step newest=none latest=-1
    for name in "$run_dir"/checkpoints/step_*; do
        step=${name##*/step_}
        [[ $step =~ ^[0-9]+$ ]] || continue  # step_N.tmp is unfinished; without any, this is the pattern itself
        if [ "$((10#$step))" -gt "$latest" ]; then newest=step_$step latest=$((10#$step)); fi
    done
    echo "$newest"
}

field() {  # NAME: a field of the job as SLURM has it now, such as JobState or Reason
    # SLURM sends TERM for a time limit, a preemption and scancel alike; only the job's state and reason at that
    # moment tell them apart. Empty when the controller does not answer: then nothing is requeued here, and the log
    # says so.
    scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null | grep -o "\b$1=[A-Za-z_]*" | cut -d= -f2
}

note() {  # EVENT REASON [EXIT_CODE]: a line for people in the log, one for programs in events.jsonl
    echo "slurm: $(date '+%F %T') job $job, restart ${SLURM_RESTART_COUNT:-0}: $1 ($2)"
    printf '{"time": %s, "job": "%s", "restarts": %s, "event": "%s", "reason": "%s", "exit_code": %s, "nodes": "%s"}\n' \
        "$(date +%s)" "$job" "${SLURM_RESTART_COUNT:-0}" "$1" "$2" "${3:-null}" "$SLURM_JOB_NODELIST" \
        >>"$notes/events.jsonl"
}

# Set here and not in supervise: without a trap bash dies of a signal, also of one that comes during the setup
# commands.
for signal in USR1 USR2 TERM; do trap "on_signal $signal" $signal; done
