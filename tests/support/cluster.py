"""A throw-away PostgreSQL cluster for the tests.

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
import time
from pathlib import Path

# Of Debian and Ubuntu, Fedora and Red Hat, Homebrew on arm64 and x86-64, and the EDB installers.
FOLDERS = [
    *("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin"),
    *("/usr/local/opt/postgresql*/bin", "/Library/PostgreSQL/*/bin"),
]
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


class Cluster:
    """A cluster in a temporary folder, on a free loopback port.

    PostgreSQL refuses to run as root: `postgres` runs it.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.user = "postgres" if os.getuid() == 0 else None
        if self.user:
            os.chown(self.folder, pwd.getpwnam(self.user).pw_uid, -1)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self.run(
            "initdb",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ).wait()
        self.start()

    def run(self, program: str, *arguments: str) -> subprocess.Popen:
        command = [str(binaries() / program), "-D", str(self.folder / "data"), *arguments]
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
        }
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        self.process = self.run("postgres", *arguments)
        import psycopg  # not installed yet when this file is run as a program

        for _ in range(600):
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self) -> None:
        """As `pg_ctl stop -m fast` does it: the connections are ended, what is committed stays."""
        self.process.send_signal(2)
        self.process.wait(30)

    def remove(self) -> None:
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


if __name__ == "__main__" and not (os.environ.get("DATABASE_URL") or binaries()):
    sys.exit(MISSING)
