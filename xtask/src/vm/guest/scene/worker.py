#!/usr/bin/python3
"""A worker's kubelet: answers every connection, and writes down from which address it came."""
import socket
import threading

ADDRESS = ("10.99.1.2", 10250)
LOG = "/run/worker.log"


def answer(client, peer):
    with client:
        client.settimeout(5)
        client.recv(4096)
        client.sendall(b"HTTP/1.0 200 OK\r\n\r\nkubelet\n")
        with open(LOG, "a") as log:
            log.write(f"{peer[0]}\n")


server = socket.create_server(ADDRESS, backlog=1024)
while True:
    threading.Thread(target=answer, args=server.accept(), daemon=True).start()
