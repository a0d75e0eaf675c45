#!/bin/sh
# Runs a command in the API server's slice.
exec systemd-run --quiet --pipe --wait --slice kube-apiserver.slice -- "$@"
