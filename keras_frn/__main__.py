"""`python -m keras_frn` is the command `keras-frn`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
