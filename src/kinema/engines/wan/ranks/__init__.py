"""One worker over several GPUs of one machine: rank 0 is the worker's own process, the others compute for it."""
