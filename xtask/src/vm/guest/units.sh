# The units of deploy/systemd under systemd as process 1, installed as deploy/README.md says.

installed() {
    cd /payload/checkout
    install -m 0755 /payload/cpc /usr/local/bin/cpc
    install -m 0644 deploy/systemd/cpc-{server,server-keeper,redirect}.service /etc/systemd/system/
    install -m 0644 deploy/systemd/cpc-{agent,agent-keeper}.service deploy/systemd/cpc-server.socket /etc/systemd/system/
    install -D -m 0644 deploy/systemd/sysusers-cpc.conf /etc/sysusers.d/cpc.conf
    install -D -m 0644 deploy/systemd/sysctl-cpc.conf /etc/sysctl.d/90-cpc.conf
    systemd-sysusers
    sysctl --quiet --system
    for unit in kube-apiserver cpc-redirect; do
        install -d "/etc/systemd/system/$unit.service.d"
        install -m 0644 "deploy/systemd/$unit.service.d/cpc-slice.conf" "/etc/systemd/system/$unit.service.d/"
    done

    pki=$(mktemp -d)
    cpc pki init --dir "$pki"
    cpc pki server --dir "$pki" --id s1 --ip 10.99.1.1 --out "$pki/server"
    cpc pki agent --dir "$pki" --node w1 --ip 10.99.1.2 --out "$pki/agent"
    install -d -m 0755 /etc/cpc
    install -m 0644 "$pki"/server/{server.crt,ca.crt} "$pki/agent/agent.crt" "$GUEST"/scene/*.yaml /etc/cpc/
    install -m 0640 -g cpc "$pki/server/server.key" /etc/cpc/
    install -m 0600 "$pki/agent/agent.key" /etc/cpc/

    install -m 0644 "$GUEST"/scene/*.service /etc/systemd/system/
    install -D -m 0644 "$GUEST/scene/agent-on-the-worker.conf" /etc/systemd/system/cpc-agent.service.d/worker.conf
    systemctl daemon-reload
    # The interfaces of the machine, which network-online.target would wait for.
    systemctl enable worker-network worker kube-apiserver cpc-redirect cpc-server cpc-agent
}

both_units_on_one_host() {
    systemctl start worker cpc-redirect cpc-server cpc-agent kube-apiserver
    for unit in cpc-redirect cpc-server cpc-agent; do eventually 120 active "$unit"; done
    # Each start gives the unit's directories to its user.
    systemctl restart cpc-server
    systemctl restart cpc-agent
    systemctl restart cpc-server
    for unit in cpc-server cpc-agent; do eventually 120 active "$unit"; done
    [ "$(stat --format %U /var/log/cpc)" = cpc ]
    ls /var/log/cpc/audit.*.jsonl /var/log/cpc-agent/audit.*.jsonl
}

main_path() {
    served
    no_leak
    python3 - <<'PYTHON'
import socket
proxy = socket.socket(socket.AF_UNIX)
proxy.settimeout(10)
proxy.connect("/run/cpc/connect.sock")
proxy.sendall(b"CONNECT 10.99.1.2:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
assert proxy.recv(4096).startswith(b"HTTP/1.1 200"), "CONNECT"
proxy.sendall(b"GET / HTTP/1.0\r\n\r\n")
answer = proxy.recv(4096)
assert answer.startswith(b"HTTP/1.0 200"), answer
PYTHON
}

sandbox() {
    for unit in cpc-server cpc-agent cpc-redirect; do
        pid=$(property "$unit" MainPID)
        for set in Inh Prm Eff Bnd Amb; do
            # The redirect's bounding set stays, and no_new_privs lets nothing come of it.
            if [ "$unit$set" = cpc-redirectBnd ]; then continue; fi
            grep --quiet "^Cap$set:[[:space:]]*0*\$" "/proc/$pid/status" || fail "$unit has capabilities ($set)"
        done
        grep --quiet "^Seccomp:[[:space:]]*2\$" "/proc/$pid/status"
        grep --quiet "^NoNewPrivs:[[:space:]]*1\$" "/proc/$pid/status"
        if [ "$unit" = cpc-redirect ]; then continue; fi
        grep --quiet "^Uid:[[:space:]]*[1-9]" "/proc/$pid/status"
    done
}

# An address that the host gets late, as from DHCP or from keepalived: what connects to it stays on the host.
a_late_address() {
    reachable() {
        /payload/guest/in-slice.sh python3 - <<'PYTHON'
import socket
server = socket.create_server(("10.99.7.7", 9999))
client = socket.create_connection(("10.99.7.7", 9999), timeout=5)
server.settimeout(5)
server.accept()
PYTHON
    }
    ip address add 10.99.7.7/32 dev lo
    eventually 60 reachable
    ip address del 10.99.7.7/32 dev lo
    served
    no_leak
}

reload() {
    from=$(mark)
    before=$(property cpc-server MainPID),$(property cpc-agent MainPID)
    sed --in-place '$a log: {filter: "info,cpc=debug"}' /etc/cpc/agent.yaml
    systemctl reload cpc-redirect
    systemctl reload cpc-server
    systemctl reload cpc-agent
    eventually 60 logged cpc-agent "$from" "allow-list and offer reloaded"
    eventually 60 logged cpc-redirect "$from" "capture set reloaded"
    # A broken configuration is refused by the process, which shows that it was read.
    sed --in-place '$a nonsense: 1' /etc/cpc/server.yaml
    systemctl reload cpc-server
    eventually 60 logged cpc-server "$from" "configuration not reloaded"
    sed --in-place '$d' /etc/cpc/server.yaml
    systemctl reload cpc-server
    for unit in cpc-redirect cpc-server cpc-agent; do eventually 300 active "$unit"; done
    [ "$before" = "$(property cpc-server MainPID),$(property cpc-agent MainPID)" ] || fail "restarted"
    served
    no_leak
}

reload_is_waited_for() {
    version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
    [ "$version" -ge 253 ] || skip "Type=notify-reload is of systemd 253, this is $version"
    for unit in cpc-server cpc-agent; do
        install -d "/run/systemd/system/$unit.service.d"
        printf '[Service]\nType=notify-reload\nExecReload=\n' >"/run/systemd/system/$unit.service.d/reload.conf"
    done
    systemctl daemon-reload
    systemctl restart cpc-server cpc-agent
    from=$(mark)
    systemctl reload cpc-server cpc-agent
    logged cpc-agent "$from" "allow-list and offer reloaded" || fail "not waited for"
    rm /run/systemd/system/cpc-{server,agent}.service.d/reload.conf
    systemctl daemon-reload
    systemctl restart cpc-server cpc-agent
    served
}

restart_of_each() {
    [ "$(property cpc-server NFileDescriptorStore)" -gt 0 ] || fail "no listener is kept"
    for unit in cpc-server cpc-agent kube-apiserver cpc-redirect; do
        systemctl restart "$unit"
        eventually 120 active "$unit"
        served
    done
    no_leak
}

a_crash_is_followed_by_a_start() {
    for unit in cpc-server cpc-agent cpc-redirect; do
        pid=$(property "$unit" MainPID)
        kill -KILL "$pid"
        another() { active "$unit" && [ "$(property "$unit" MainPID)" != "$pid" ]; }
        eventually 120 another
        served
    done
    no_leak
}

watchdog() {
    for unit in cpc-server cpc-agent; do
        from=$(mark)
        pid=$(property "$unit" MainPID)
        kill -STOP "$pid"
        another() { active "$unit" && [ "$(property "$unit" MainPID)" != "$pid" ]; }
        eventually 180 another
        logged "$unit" "$from" "atchdog" || fail "$unit ended without the watchdog"
        served
    done
    no_leak
}

a_late_certificate() {
    for unit in cpc-agent cpc-server; do
        role=${unit#cpc-}
        systemctl stop "$unit"
        mv "/etc/cpc/$role.crt" "/etc/cpc/$role.late"
        systemctl start "$unit" && fail "it starts without a certificate"
        sleep 8
        mv "/etc/cpc/$role.late" "/etc/cpc/$role.crt"
        eventually 120 active "$unit"
    done
    served
    no_leak
}

socket_activation() {
    systemctl stop cpc-server
    systemctl enable cpc-server.socket
    systemctl start cpc-server.socket
    systemctl start cpc-server
    eventually 120 active cpc-server
    from=$(mark)
    inode=$(stat --format %i /run/cpc/connect.sock)
    systemctl restart cpc-server
    eventually 120 active cpc-server
    [ "$inode" = "$(stat --format %i /run/cpc/connect.sock)" ] || fail "another CONNECT socket"
    if logged cpc-server "$from" "is not used"; then fail "a socket is not used"; fi
    main_path
}

# What a boot left behind, looked at when the next one is up.
boot_order() {
    for unit in cpc-redirect cpc-server cpc-agent kube-apiserver; do eventually 300 active "$unit"; done
    served 300
    no_leak
    # The host's own address, which it has had since worker-network.service.
    /payload/guest/in-slice.sh python3 - <<'PYTHON'
import socket
server = socket.create_server(("10.99.1.1", 9999))
client = socket.create_connection(("10.99.1.1", 9999), timeout=5)
server.settimeout(5)
server.accept()
PYTHON
}

guard_installed() {
    cd /payload/checkout/deploy/systemd
    install -m 0644 cpc-redirect-attached.service /etc/systemd/system/
    install -m 0644 kube-apiserver.service.d/cpc-guard.conf /etc/systemd/system/kube-apiserver.service.d/
    systemctl daemon-reload
    mv /etc/cpc/server.crt /etc/cpc/server.late
}

guard_holds_the_api_server_back() {
    tried_again() { [ "$(property cpc-redirect NRestarts)" -ge 3 ]; }
    eventually 120 tried_again
    active kube-apiserver && fail "it runs, and nothing is attached"
    [ ! -e /run/kube-apiserver.log ] || fail "it ran"
    no_leak
    mv /etc/cpc/server.late /etc/cpc/server.crt
    eventually 120 active cpc-redirect
    eventually 120 active cpc-redirect-attached
    eventually 120 active kube-apiserver
    served 300
    no_leak
}

guard_does_not_mind_the_redirect() {
    pid=$(property kube-apiserver MainPID)
    same() { [ "$(property kube-apiserver MainPID)" = "$pid" ] || fail "the API server was restarted: $1"; }
    systemctl reload cpc-redirect
    same reload
    redirect=$(property cpc-redirect MainPID)
    kill -KILL "$redirect"
    another() { active cpc-redirect && [ "$(property cpc-redirect MainPID)" != "$redirect" ]; }
    eventually 120 another
    served
    same crash
    systemctl restart cpc-redirect
    served
    same restart
    systemctl stop cpc-redirect
    served
    same stop
    systemctl start cpc-redirect
    served
    same start
    no_leak
}
