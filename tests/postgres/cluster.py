"""A throw-away PostgreSQL cluster for the tests, PgBouncer in front of it, and a line that breaks.

Run as a program, it prints one line if PostgreSQL is not installed.
"""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

# Of Debian and Ubuntu, Fedora and Red Hat, Homebrew on arm64 and x86-64, and the EDB installers.
FOLDERS = [
    *("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin"),
    *("/usr/local/opt/postgresql*/bin", "/Library/PostgreSQL/*/bin"),
]
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
MISSING = (
    "PostgreSQL is not on this machine: install it (apt install postgresql, "
    "dnf install postgresql-server, brew install postgresql) or set DATABASE_URL to a database "
    "in which the tests may create schemas."
)


def binaries() -> Path | None:
    """The folder of initdb and postgres, the newest there is."""
    on_path = shutil.which("postgres") and shutil.which("initdb")
    folders = [folder for pattern in FOLDERS for folder in sorted(Path("/").glob(pattern[1:]))]
    found = [
        folder
        for folder in folders
        if (folder / "initdb").exists() and (folder / "postgres").exists()
    ]
    return Path(on_path).resolve().parent if on_path else found[-1] if found else None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Cluster:
    """A cluster in a temporary folder, on a free loopback port.

    PostgreSQL and PgBouncer refuse to run as root: the user `postgres` runs them.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.user = "postgres" if os.getuid() == 0 else None
        if self.user:
            os.chown(self.folder, pwd.getpwnam(self.user).pw_uid, -1)
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self.pooler: subprocess.Popen | None = None
        self.run(
            "initdb",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ).wait()
        (self.folder / "data" / "pg_hba.conf").write_text(
            "hostnossl all +tls_demanded 127.0.0.1/32 reject\n"
            "host all postgres 127.0.0.1/32 trust\n"
            "host all all 127.0.0.1/32 scram-sha-256\n"
        )
        self.start()

    def run(self, program: str, *arguments: str) -> subprocess.Popen:
        return self.popen(str(binaries() / program), "-D", str(self.folder / "data"), *arguments)

    def popen(self, *command: str) -> subprocess.Popen:
        with open(self.folder / "log", "a") as output:
            return subprocess.Popen(
                command, user=self.user, cwd=self.folder, stdout=output, stderr=output
            )

    def start(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": 300,
        }
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        self.process = self.run("postgres", *arguments)
        self.wait_for(self.url)

    def wait_for(self, url: str) -> None:
        import psycopg  # not installed yet when this file is run as a program

        for _ in range(600):
            try:
                psycopg.connect(url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text())

    def start_pooler(self) -> None:
        """PgBouncer as hosting platforms run it: each transaction may get another session."""
        self.pooler_port = free_port()
        (self.folder / "pgbouncer.ini").write_text(
            "[databases]\n"
            f"* = host=127.0.0.1 port={self.port} user=postgres\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.pooler_port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\n"
            "max_client_conn = 500\n"
        )
        self.pooler = self.popen(PGBOUNCER, str(self.folder / "pgbouncer.ini"))
        self.wait_for(f"postgresql://postgres@127.0.0.1:{self.pooler_port}/postgres")

    def stop(self) -> None:
        """As `pg_ctl stop -m fast` does it: the connections are ended, what is committed stays."""
        self.process.send_signal(2)
        self.process.wait(30)

    def remove(self) -> None:
        if self.pooler:
            self.pooler.terminate()
            self.pooler.wait(30)
        self.stop()
        shutil.rmtree(self.folder)


class Database:
    """The database of DATABASE_URL, or a throw-away cluster.

    Each test or server has a schema of its own in it.
    """

    def __enter__(self) -> "Database":
        theirs = os.environ.get("DATABASE_URL")
        self.cluster = None if theirs else Cluster()
        self.url = theirs or self.cluster.url
        self.schemas: list[str] = []
        return self

    def __exit__(self, *_) -> None:
        if self.cluster:
            self.cluster.remove()
            return
        with self.connect() as connection:
            for schema in self.schemas:
                connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")

    def connect(self, url: str = ""):
        import psycopg  # not installed yet when this file is run as a program

        return psycopg.connect(url or self.url, autocommit=True)

    def schema(self) -> str:
        """The URL of a new, empty schema."""
        from psycopg.conninfo import conninfo_to_dict, make_conninfo

        name = f"chatkit_test_{secrets.token_hex(8)}"
        self.schemas.append(name)
        with self.connect() as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        options = conninfo_to_dict(self.url).get("options", "")
        return make_conninfo(self.url, options=f"{options} -c search_path={name}")

    def fresh(self) -> str:
        """The URL of a new, empty database of the cluster."""
        name = f"chatkit_test_{secrets.token_hex(8)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url.removesuffix("postgres") + name

    def pooled(self) -> str | None:
        """The URL of a new, empty database behind PgBouncer, if that can be started here.

        All of its clients share two connections, each for one transaction.
        """
        if not self.cluster or not PGBOUNCER:
            return None
        if not self.cluster.pooler:
            self.cluster.start_pooler()
        return self.fresh().replace(f":{self.cluster.port}/", f":{self.cluster.pooler_port}/")


class Line:
    """A port that leads to the cluster, until it is cut, or silent as when packets are lost."""

    def __init__(self, port: int) -> None:
        self.target, self.port = port, free_port()
        self.flows = threading.Event()
        self.sockets: list[socket.socket] = []
        self.repair()

    def repair(self) -> None:
        self.flows.set()
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=[self.listener], daemon=True).start()

    def accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self.forward, args=pair, daemon=True).start()

    def forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # the other direction has ended
            while data := source.recv(65536):
                self.flows.wait()
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        self.flows.clear()

    def cut(self) -> None:
        """End all connections, and refuse new ones."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for end in self.sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__" and not (os.environ.get("DATABASE_URL") or binaries()):
    sys.exit(MISSING)
