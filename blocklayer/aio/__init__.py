"""Layer ``aio``: the I/O engine and the small tools of concurrency that the graph and the jobs stand on.

engine, threads   blocking calls in batches on few worker threads       file       one open file or block device
fallocate, direct what Python's os module lacks for zeroes and O_DIRECT  locking    image locks that QEMU honours
range_lock        exclusive holds on byte ranges                         task_pool  at most N tasks at once
clock, leaky_bucket                                                      time that tests can drive, and limits on it
"""
