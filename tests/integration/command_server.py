"""Runs typed commands in processes that are forked from one which has imported all, as imports take each ten seconds.

``python command_server.py SOCKET`` serves scripts that send the size of a request with their three standard files, and
then the request: the module whose main function runs, the arguments, the folder and the environment.
"""

import json
import os
import socket
import sys
from importlib import import_module

_PRELOADED = ("anomalib.cli.cli", "anomalib_ot.cli", "anomalib_ot.comparison", "anomalib_ot.models")


def serve(path):
    """Serve one command after another."""
    for module in _PRELOADED:
        import_module(module)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            client, _ = listener.accept()
            with client:
                size, files, *_ = socket.recv_fds(client, 4, 3)
                request = b""
                while len(request) < int.from_bytes(size, "big"):
                    request += client.recv(1 << 16)
                child = os.fork()
                if child == 0:
                    return run(files, *json.loads(request))
                for file in files:
                    os.close(file)
                client.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255]))


def run(files, module, arguments, folder, environment):
    """Run the main function of a module as if it had been started with these files, arguments and environment."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    return import_module(module).main()


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
