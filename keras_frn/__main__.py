"""`python -m keras_frn` is the command `keras-frn`."""

from keras_frn_command import main

if __name__ == "__main__":
    raise SystemExit(main())
