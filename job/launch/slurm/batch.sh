# The batch step of a run under SLURM: starts the ranks, passes signals on to them, and requeues the job when its exit
# code says so. Sourced by slurm/train.sbatch and written into the job scripts of hydra/launcher=slurm, where
# bad_nodes.sh, setup commands and `supervise` follow. Only bash and SLURM's commands are needed, also when the ranks
# live in a container that has neither.
#
# Variables of the whole script: job, signal_received, ranks, requeued and those below here; run_dir, notes,
# max_restarts from `supervise`; signal_delay from the job script, where it is known.

# srun's own failures (a node that does not answer) get a code of their own. The default is 1, which for a rank means
# that no retry helps. From 128 on the job is requeued.
export SLURM_EXIT_ERROR=135
export PYTHONUNBUFFERED=1
signal_received=""  # the first signal that told this job to stop
launched=$(date +%s)
signal_after=""     # how many seconds after the job's start that was
ranks=""            # process id of srun
requeued=""
patience=600  # seconds for which a controller that does not answer is asked again; it may be restarting
poll=5        # seconds between two questions
soon=60       # a job that is told to stop within so many seconds had no time to train
linger=${CYCLEVAE_LINGER_SECONDS:-60}  # how long the ranks may take to end once the first has left

# SLURM_JOB_ID alone is not enough: the last task of an array has the array's own id there, which for SLURM's commands
# means all its tasks.
job=$SLURM_JOB_ID
if [ -n "$SLURM_ARRAY_JOB_ID" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

setup_failed() {  # EXIT_CODE COMMAND: a setup command failed; without its modules the ranks would fail less clearly
    echo "slurm: job $job on $(hostname): the setup command failed with exit code $1: $2" >&2
    exit "$1"
}

interrupted_early() {  # EXIT_CODE of what comes before the ranks: requeue if a signal ended it, exit
    # No checkpoint can have come of this, and nothing is counted in a run directory yet: SLURM's own count must end
    # it. 255 is srun's code for options that it does not know.
    if [ "$1" -ge 128 ] && [ "$1" != 255 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] \
        && [ "$(field JobState)" = RUNNING ]; then
        ask_requeue || echo "slurm: job $job cannot be requeued: $error" >&2
    fi
    exit "$1"
}

supervise() {  # RUN_DIR TARGETS_DIR MAX_RESTARTS COMMAND...: run srun's COMMAND to its end; returns its exit code
    local code targets=$2
    run_dir=$1 max_restarts=$3 notes=$1/slurm
    shift 3
    mkdir -p "$notes" || return 1
    claim || return 1
    exec >>"$notes/$job.log" 2>&1
    CYCLEVAE_LAST_END=$(last_end)
    export CYCLEVAE_LAST_END CYCLEVAE_LAUNCHED=$launched  # goodput.json tells waiting from hanging by them
    note started "$SLURM_JOB_NUM_NODES nodes, $SLURM_NTASKS tasks"
    export CYCLEVAE_FAILURES=$notes/failures.jsonl  # where ranks say why they failed; srun hands the variable on
    : >"$CYCLEVAE_FAILURES"                         # those of an earlier start explain nothing any more
    note_places
    if [ -n "$signal_received" ]; then
        code=143
    elif no_time_to_train; then
        code=1
    else
        run_ranks "$@"
        code=$?
        # Where Prometheus would look for ranks that were killed; those that ended by themselves removed theirs.
        rm -f "$targets"/cyclevae-*@"$SLURM_JOB_ID.json"
    fi
    if [ "$code" = 0 ]; then
        note finished "exit code 0" 0
    elif [ "$code" = 255 ] && ! have_met; then
        # srun's own code for options that it does not know, such as pyxis' where that is not installed.
        note failed "exit code 255: srun refused its options, see the log" "$code"
    elif [ "$code" -lt 128 ]; then
        note failed "exit code $code: a retry will not mend it" "$code"
    else
        after_interruption "$code"
    fi
    return "$code"
}

claim() {  # make the run this job's; 1 where another job has it
    # Two jobs of one run (sbatch given twice, or after a submit) would take turns: the second waits at the trainer's
    # lock, gives up, and is requeued again and again while it holds its nodes. The file `job` is made by one job only.
    local owner state end=$((SECONDS + patience))
    until (set -C; echo "$job" >"$notes/job") 2>/dev/null; do
        owner=$(cat "$notes/job" 2>/dev/null)
        [ "$owner" != "$job" ] || return 0
        # Our own job is asked for as well: it is always in the queue, so an answer without it is none.
        state=$(squeue --noheader --array --jobs="${owner:-$job},$job" --format="%i %T" 2>/dev/null)
        case " $(echo $state) " in
            *" $owner COMPLETING "*) sleep "$poll" ;;  # it was cancelled and saves
            *" $owner "*)
                note refused "$run_dir is being trained by job $owner" 1
                return 1 ;;
            *" $job "*) rm -f "$notes/job" ;;  # the owner has left the queue
            *) sleep "$poll" ;;
        esac
        if [ "$SECONDS" -ge "$end" ]; then
            echo "slurm: $notes/job cannot be written, or job $owner has not ended, or SLURM does not answer" >&2
            return 1
        fi
    done
}

no_time_to_train() {  # whether SLURM would tell the job to stop as soon as it starts
    local limit days=0 hours minutes seconds
    [ -n "$signal_delay" ] || return 1
    limit=$(field TimeLimit 30)
    [[ $limit =~ ^[0-9:-]+$ ]] || return 1  # UNLIMITED, or no answer
    if [[ $limit = *-* ]]; then days=${limit%-*}; fi
    IFS=: read -r hours minutes seconds <<<"${limit#*-}"
    [ "$signal_delay" -ge $((((10#$days * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds)) ] || return 1
    echo "slurm: hydra.launcher.signal_delay_s=$signal_delay is not below the time limit $limit: the run would be" \
        "told to stop as soon as it starts; give it more time (hydra.launcher.timeout_min) or a shorter delay"
}

run_ranks() {  # COMMAND...: run srun's COMMAND to its end; returns its exit code
    local heartbeat guard
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
    end_leftover_ranks &
    guard=$!
    # A signal ends `wait` before the ranks have ended, and its value is the signal's then.
    while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done
    wait "$ranks"
    local code=$?
    kill "$heartbeat" "$guard" 2>/dev/null
    rm -f "$notes/alive"
    return "$code"
}

end_leftover_ranks() {  # end the step when a rank has left for another's sake and the others do not follow
    # A frozen rank ends by nothing but KILL, and all nodes would be held for it until srun's --wait is over. Ranks that
    # have met need a while, to notice and to say whom they lost. Those that have not (the port was taken) only wait.
    until grep -qs '"exit_code": 134' "$CYCLEVAE_FAILURES"; do
        sleep "$poll"
        kill -0 "$ranks" 2>/dev/null || return
    done
    if have_met; then sleep "$linger"; else sleep "$poll"; fi
    if kill -0 "$ranks" 2>/dev/null; then echo "slurm: ending the ranks that are left"; fi
    # The first QUIT makes srun kill its tasks, the second has the controller do it.
    while kill -QUIT "$ranks" 2>/dev/null; do sleep 10; done
}

have_met() {  # whether the ranks of this start have met
    # Rank 0, on this node, writes environment.json then; one that is older than `started` is of an earlier start.
    [ -e "$run_dir/environment.json" ] && ! [ "$run_dir/environment.json" -ot "$notes/started" ]
}

on_signal() {  # SIGNAL
    signal_received=${signal_received:-$1} signal_after=${signal_after:-$SECONDS}
    # Always as USR1: SLURM sends TERM to the ranks by itself, and a second TERM would end them without saving.
    [ -z "$ranks" ] || pass_on >/dev/null 2>&1 &
    # SLURM requeues by itself after preemption and node failures, after a time limit never. It has to be done at once
    # and not when the ranks have ended, as KILL comes after KillWait, to this script too.
    if [ "$1" = TERM ] && [ -n "$ranks" ] && [ "$(field Reason 10)" = TimeLimit ]; then
        requeue "time limit reached" 143
    fi
}

pass_on() {  # USR1 to the ranks, once they have met
    # Before, the signal would end a rank whose Python is still starting and has no handler, and the others would wait
    # for that one until they time out.
    until have_met; do
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
    note_losses
    state=$(field JobState)
    if [ -z "$state" ]; then
        note failed "$reason; not requeued: the controller has not answered for $patience s" "$1"
    elif [ "$state" = RUNNING ]; then
        requeue "$reason" "$1"
    else  # cancelled, requeued by an administrator, preempted, out of time
        note stopped "$reason; SLURM decides, state $state" "$1"
    fi
}

requeue() {  # REASON EXIT_CODE: unless the run is to be given up by the rule of job/launch/restarts.py
    # The count is kept in the file restarts: the job, the newest checkpoint, the number of restarts from it, and how
    # many starts in a row were told to stop at once. A job with another number was submitted anew and counts from zero.
    local newest last_job last_newest count at_once
    newest=$(newest_checkpoint)
    read -r last_job last_newest count at_once 2>/dev/null <"$notes/restarts"
    if [ "$last_job $last_newest" != "$job $newest" ]; then count=0; fi
    if [ "$last_job" != "$job" ]; then at_once=0; fi
    if [ "$signal_received" != USR1 ] || [ "$signal_after" -ge "$soon" ]; then at_once=-1; fi
    at_once=$((at_once + 1))
    if [ "$count" -ge "$max_restarts" ]; then
        note failed "$1; not requeued: $count restarts without a new checkpoint, max_restarts=$max_restarts" "$2"
        return
    fi
    if [ "$at_once" -gt "$max_restarts" ]; then
        # Each start saves a step or two, so it never fails to make progress; it would go on for ever at that pace.
        note failed "$1; not requeued: told to stop within $soon s of $at_once starts in a row, so the time limit \
leaves no time to train; raise it, or have --signal come later" "$2"
        return
    fi
    requeued=yes
    # Both are written first: on `scontrol requeue` SLURM ends this script.
    echo "$job $newest $((count + 1)) $at_once" >"$notes/restarts"
    note requeued "$1; restart $((count + 1)) of at most $max_restarts from checkpoint $newest" "$2"
    if ask_requeue; then avoid_bad_nodes; else note failed "cannot be requeued: $error" "$2"; fi
}

ask_requeue() {  # have SLURM requeue the job; 1 where it does not, with its words in `error`
    local code refusals=0 end=$((SECONDS + patience))
    while true; do
        error=$(scontrol requeue "$job" 2>&1)
        code=$?
        # From 128 on a signal has ended scontrol: the requeue has begun, and SLURM ends all the job's processes for it.
        if [ "$code" = 0 ] || [ "$code" -ge 128 ]; then return 0; fi
        # scontrol has one exit code for a refusal and for a controller that is away. Who then answers with RUNNING
        # has refused, unless it has come back just in between: it is asked once more.
        case $(field JobState 0) in
            RUNNING) refusals=$((refusals + 1)); [ "$refusals" -lt 2 ] || return 1 ;;
            "") [ "$SECONDS" -lt "$end" ] || return 1 ;;
            *) return 0 ;;  # requeued, though the answer was lost
        esac
        sleep "$poll"
    done
}

last_end() {  # when the ranks of the last start had ended, in seconds since 1970; nothing before the first
    # `alive` is left over where the batch step was killed together with them, for instance with its node.
    if [ -e "$notes/alive" ]; then
        stat --format=%Y "$notes/alive"
    elif [ -e "$notes/events.jsonl" ]; then
        grep -v '"event": "refused"' "$notes/events.jsonl" | tail -n 1 | grep -o '"time": [0-9]*' | grep -o '[0-9]*$'
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

field() {  # NAME [SECONDS]: a field of the job as SLURM has it now, such as JobState or Reason
    # SLURM sends TERM for a time limit, a preemption and scancel alike; only the job's state and reason at that
    # moment tell them apart. A controller that does not answer is asked again for SECONDS; empty when it never does.
    local answer end=$((SECONDS + ${2:-$patience}))
    until answer=$(scontrol show job --oneliner "$job" 2>/dev/null) && [ -n "$answer" ]; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep "$poll"
    done
    echo "$answer" | grep -o "\b$1=[A-Za-z_0-9:-]*" | head -n 1 | cut -d= -f2
}

note() {  # EVENT REASON [EXIT_CODE]: a line for people in the log, one for programs in events.jsonl
    local reason=${2//[\"\\]/}  # SLURM's own words may hold what would break the line
    reason=${reason//[[:cntrl:]]/ }
    echo "slurm: $(date '+%F %T') job $job, restart ${SLURM_RESTART_COUNT:-0}: $1 ($reason)"
    local line='{"time": %s, "job": "%s", "restarts": %s, "event": "%s", "reason": "%s", "exit_code": %s, '
    printf "$line"'"nodes": "%s", "node_count": %s}\n' \
        "$(date +%s)" "$job" "${SLURM_RESTART_COUNT:-0}" "$1" "$reason" "${3:-null}" \
        "$SLURM_JOB_NODELIST" "${SLURM_JOB_NUM_NODES:-null}" >>"$notes/events.jsonl"
}

# Set here and not in supervise: without a trap bash dies of a signal, also of one that comes during the setup
# commands.
for signal in USR1 USR2 TERM; do trap "on_signal $signal" $signal; done
