#!/bin/bash
# What the virtual machine does after each of its boots. Started by cpc-vm.service, which gives it the
# second serial port as its output.
export GUEST=/payload/guest
. /payload/settings
cd "$GUEST" || exit 1
. ./check.sh
. ./units.sh

stage=$(cat /var/lib/cpc-vm-stage 2>/dev/null || echo 1)
# The worker and the API server begin with the boot; their logs are of it alone (/run).
case $stage in
1)
    echo "machine $(uname -r), systemd $(systemctl --version | sed -n '1s/^systemd [0-9]* (\(.*\))/\1/p')"
    if [ -n "$TESTS" ]; then . ./tests.sh; fi
    if [ -n "$UNITS" ]; then
        check installed
        for name in both_units_on_one_host main_path sandbox a_late_address reload reload_is_waited_for restart_of_each \
            a_crash_is_followed_by_a_start watchdog a_late_certificate socket_activation; do
            check "$name"
        done
        echo 2 >/var/lib/cpc-vm-stage
        exec systemctl reboot
    fi
    ;;
2)
    check boot_order
    check guard_installed
    echo 3 >/var/lib/cpc-vm-stage
    exec systemctl reboot
    ;;
3)
    check guard_holds_the_api_server_back
    check guard_does_not_mind_the_redirect
    ;;
esac
echo finished
sync
exec systemctl poweroff
