"""What the programs here do with the one that they measure before they start it."""

import os
import subprocess


def make_keys(program, environment, directory):
    """A mesh's key and a publisher's: the two files, and the publisher's public key."""

    def keygen(*arguments):
        command = [program, "keygen", *arguments]
        return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    mesh, publisher = (os.path.join(directory, name) for name in ("mesh.key", "publisher.key"))
    keygen("mesh", "--out", mesh)
    keygen("publisher", "--out", publisher)
    return mesh, publisher, keygen("public", publisher).strip()
