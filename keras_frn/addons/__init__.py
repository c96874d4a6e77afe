"""Files saved by TensorFlow Addons; `loading` has the public functions."""
