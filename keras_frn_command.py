"""The command `keras-frn`: quiet from its first moment, and gone soon after Ctrl-C.

It is outside of the package, as importing a part of the package imports TensorFlow first."""

import os
import signal
import sys
import threading


def main():
    """Runs the command line; returns the exit code."""
    signal.signal(signal.SIGINT, _interrupt)
    if hasattr(signal, "SIGPIPE"):  # as in `keras-frn inspect model.keras | head -1`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
        # TensorFlow logs into the file descriptor whatever the level is. Python's messages stay.
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    try:
        from keras_frn import cli

        return cli.main()
    except KeyboardInterrupt:
        print("\nkeras-frn: interrupted", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # past threads that still work, and their messages


def _interrupt(number, frame):
    # Code that swallows the exception, or does not come to an end, has five seconds.
    timer = threading.Timer(5, os._exit, [130])
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt
