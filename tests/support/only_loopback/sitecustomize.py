"""On the path of every server under test: refuses and reports any address but loopback."""

import socket
import sys

look_up, connect = socket.getaddrinfo, socket.socket.connect


def allowed(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", "0.0.0.0", "::1") or host.startswith("127."):
        return True
    print(f"OUTSIDE: {host}", file=sys.stderr, flush=True)
    return False


def guarded_look_up(host, *args, **kwargs):
    if not allowed(host):
        raise socket.gaierror(f"{host} is not loopback")
    return look_up(host, *args, **kwargs)


def guarded_connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not allowed(address[0]):
        raise OSError(f"{address[0]} is not loopback")
    return connect(self, address)


socket.getaddrinfo, socket.socket.connect = guarded_look_up, guarded_connect
