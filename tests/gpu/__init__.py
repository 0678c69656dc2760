"""What needs a GPU: run by launch/gpu_check.sh, never by `make test`."""
