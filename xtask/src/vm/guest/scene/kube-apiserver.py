#!/usr/bin/python3
"""kube-apiserver: connects to the worker's kubelet without a pause, and writes down what came of it."""
import errno
import socket
import time

KUBELET = ("10.99.1.2", 10250)
LOG = "/run/kube-apiserver.log"


def attempt():
    try:
        with socket.create_connection(KUBELET, timeout=10) as kubelet:
            kubelet.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return "answered" if kubelet.recv(4096).startswith(b"HTTP/1.0 200") else "cut"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))


while True:
    outcome = attempt()
    with open(LOG, "a") as log:
        log.write(f"{time.monotonic():.3f} {outcome}\n")
    time.sleep(0.02)
