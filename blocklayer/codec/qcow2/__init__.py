"""Layer ``codec/qcow2``: the qcow2 format as bytes, values and plans. No I/O; source: QEMU's docs/interop/qcow2.

header      the first cluster, checked           features     feature bits and their names
extensions  header extensions                    geometry     the numbers that say how tables are read; limits
entries     L1 and L2 entries, runs              refcounts    counters of 1 to 64 bits in refcount blocks
compress    deflate and zstd clusters            snapshots    directories of snapshots and stored bitmaps
create      layout of a new image                plan         order of a flush's writes: epochs
check       recompute all refcounts              repair       make refcounts equal references
"""
