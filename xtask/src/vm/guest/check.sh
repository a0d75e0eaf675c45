# Functions that the checks share. Results are lines, read by `cargo xtask vm`:
#   result ok|failed|skipped NAME SECONDS [REASON]

SKIPPED=77

# check NAME: runs the function NAME in a shell of its own.
check() {
    local name=$1 start=$SECONDS code
    (set -euo pipefail; "$name") >/tmp/check.log 2>&1
    code=$?
    case $code in
    0) echo "result ok $name $((SECONDS - start))" ;;
    "$SKIPPED") echo "result skipped $name $((SECONDS - start)) $(tail -n 1 /tmp/check.log)" ;;
    *)
        echo "result failed $name $((SECONDS - start)) exit code $code"
        sed 's/^/| /' /tmp/check.log
        journalctl --boot --no-pager --lines 60 --output short-monotonic --unit 'cpc-*' --unit kube-apiserver | sed 's/^/| /'
        ;;
    esac
}

# skip REASON: ends the check.
skip() {
    echo "$*"
    exit "$SKIPPED"
}

fail() {
    echo "$*"
    exit 1
}

# eventually SECONDS COMMAND..: waits until the command succeeds.
eventually() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || fail "not within the time: $*"
        sleep 0.2
    done
}

active() { [ "$(systemctl show --value --property ActiveState "$1")" = active ]; }
property() { systemctl show --value --property "$2" "$1"; }
# What the unit has logged since the cursor that `mark` printed.
mark() { journalctl --no-pager --lines 0 --show-cursor | sed -n 's/^-- cursor: //p'; }
logged() { journalctl --no-pager --output cat --after-cursor "$2" --unit "$1" | grep --quiet --fixed-strings -- "$3"; }
# Attempts of the API server since line $1 of its log that ended as $2.
attempts() { tail -n "+$1" /run/kube-apiserver.log | grep --count " $2\$" || true; }
lines() { wc -l <"$1"; }
# How many connections reached the worker by the ordinary route: from the host's own address.
# The log begins with the first connection.
leaks() { cat /run/worker.log 2>/dev/null | grep --count --fixed-strings --line-regexp 10.99.1.1 || true; }
no_leak() { [ "$(leaks)" = 0 ] || fail "$(leaks) connections left by the ordinary route"; }
served() {
    local from=$(($(lines /run/kube-apiserver.log) + 1))
    answered() { [ "$(attempts "$from" answered)" -ge 5 ]; }
    eventually "${1:-120}" answered
}
