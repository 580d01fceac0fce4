"""Benchmarks: blocklayer side by side with the programs people use today.

    python -m benchmarks                          all of them, and a table (what `make bench` runs)
    python -m benchmarks.backup_full --rounds 3   one of them

Layers of this package: the scenarios (one file each) sit on ``ours`` and on the peers (``storage_daemon``,
``qemu_img``, ``fio``), those on ``images`` and ``loops``. ``harness`` runs rounds, ``report`` shows what came out.

Rules that every scenario keeps
- Rounds are interleaved (ours, theirs, ours, theirs...) in one run, and medians are compared: on a shared machine
  ratios can be believed, absolute numbers cannot.
- Both sides find the same state: the same files, sources in the page cache (in small pages where small requests are
  measured, see ``images.warm_in_small_pages``), no dirty pages left by the side before.
- The same work is done: the same offsets, the same data, the same durability.
- A ratio above 1 means that ours is better, whatever the unit.
"""
