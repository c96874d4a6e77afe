"""Files saved by TensorFlow Addons. `loading` has the public functions.

This file imports nothing: `keras_frn` itself needs `legacy` only.
"""
